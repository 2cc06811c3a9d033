# SPDX-License-Identifier: GPL-2.0-or-later
"""What the demo shows, in three acts: a rotation, one that is killed, and what reconcile makes of it."""

import json
from pathlib import Path

from luksrotd import names
from luksrotd.luks2.layout import Which
from tests.demo import volume
from tests.demo.commands import CHEAP, Commands
from tests.demo.screen import Screen, check
from tests.demo.volume import Image
from tests.demo.ways import Way

MAIN = "main.key"
BACKUPS = ("backup-1.key", "backup-2.key", "backup-3.key")
DATA = tuple(json.dumps({"escrow": f"vault/{number}"}) for number in (41, 42, 43))


class Play:
    """Acts on the volume ``way.target``; raises ``Broken`` at the first thing that is not as promised."""

    def __init__(self, screen: Screen, commands: Commands, way: Way) -> None:
        self._screen = screen
        self._commands = commands
        self._way = way
        self._volume = way.target
        self._name = way.name
        self._scratch = commands.directory / "copy.img"

    def format(self) -> None:
        """Stock cryptsetup makes the volume."""
        for name in (MAIN, *BACKUPS):
            self._commands.key(name, f"sham secret in {name}".encode())
        with self._screen.step("stock cryptsetup formats it: a cheap pbkdf2 for a quick demo, else its defaults"):
            options = ("--batch-mode", "--type", "luks2", *CHEAP, "--key-file", MAIN)
            self._commands.run("cryptsetup", "luksFormat", *options, self._name)
            check(self._pairs(self._volume) == [], "a new volume has tokens of ours")

    def enroll(self) -> None:
        """The volume gets a backup key."""
        before = volume.read(self._volume)
        self._way.enroll(MAIN, BACKUPS[0], DATA[0])
        self._table("keyslots and tokens, by luksDump", before, volume.read(self._volume))
        with self._screen.step("one pair of keyslot and token, generation 1; the backup key and the main key open"):
            self._is_at(1)

    def rotate(self) -> None:
        """It is replaced."""
        before = volume.read(self._volume)
        self._way.rotate(BACKUPS[0], BACKUPS[1], DATA[1])
        after = volume.read(self._volume)
        self._table("keyslots and tokens, by luksDump", before, after)
        with self._screen.step("stock cryptsetup: the new key opens, the old one does not, the main one still does"):
            check(self._commands.opens(self._name, BACKUPS[1], quiet=False), "the new key does not open")
            check(not self._commands.opens(self._name, BACKUPS[0], quiet=False), "the old key still opens")
            check(self._commands.opens(self._name, MAIN, quiet=False), "the main key does not open any more")
        with self._screen.step("one pair, generation 2, both header copies alike, no wipe owed"):
            self._is_at(2)
        with self._screen.step("the old key is gone for good: its area is overwritten, the old header would not help"):
            self._is_gone(before, after, BACKUPS[0])

    def crash(self) -> Image:
        """A rotation is killed between the writes of the two header copies; the volume before it."""
        before = volume.read(self._volume)
        self._way.rotate_until_killed(BACKUPS[1], BACKUPS[2], DATA[2])
        left = volume.read(self._volume)
        self._screen.say(
            "What is on disk; tried on copies, as stock cryptsetup would mend the header as soon as it looked:"
        )
        self._show_copies(left)
        primary, secondary = left.copy(Which.PRIMARY).header.seqid, left.copy(Which.SECONDARY).header.seqid
        with self._screen.step(f"copy 1 is new (sequence number {primary}), copy 2 old ({secondary}): half a rotation"):
            check(primary > secondary, "copy 1 is not newer than copy 2")
            check(secondary == before.copy(Which.SECONDARY).header.seqid, "copy 2 is not the old one")
        with self._screen.step("each copy alone: the key that its token names opens, the other does not, main does"):
            check(self._openers(left.alone(Which.PRIMARY)) == {MAIN, BACKUPS[2]}, "wrong keys open copy 1")
            check(self._openers(left.alone(Which.SECONDARY)) == {MAIN, BACKUPS[1]}, "wrong keys open copy 2")
        with self._screen.step("luksDump reads the new pair, and that pair only"):
            self._scratch.write_bytes(left.content)
            pairs = self._pairs(self._scratch)
            check([generation for generation, _ in pairs] == [3], f"luksDump shows {pairs}")
        with self._screen.step("the retired area still holds the old key, and the token's wipe intent names it"):
            area = before.area()
            check(left.in_area(area) == before.in_area(area), "the area was touched")
            check(left.token().wipe == (area,), f"the intent names {left.token().wipe}, the area is {area}")
        return before

    def reconcile(self, before: Image) -> None:
        """It is finished, without any key; ``before`` is the volume before the rotation that was killed."""
        left = volume.read(self._volume)
        with self._screen.step("a dry run tells what would be done, and does nothing"):
            said = self._commands.luksrotctl("--direct", "reconcile", "--dry-run", self._name)
            check("header copies differ" in said, "the differing header copies are not found")
            check("has not been wiped" in said, "the pending wipe is not found")
            check(volume.read(self._volume).content == left.content, "the dry run has changed the volume")
        with self._screen.step("reconcile does it; no key is asked for"):
            said = self._commands.luksrotctl("--direct", "reconcile", self._name)
            check(said.count("repaired: ") == 2, "not both findings were repaired")
        after = volume.read(self._volume)
        self._show_copies(after)
        with self._screen.step("clean: one pair, generation 3, both header copies alike, no wipe owed"):
            self._is_at(3)
            check(not self._commands.opens(self._name, BACKUPS[1]), "the retired key still opens")
        with self._screen.step("the retired key is gone for good: area overwritten, the old header would not help"):
            self._is_gone(before, after, BACKUPS[1])
        with self._screen.step("a second reconcile has nothing to do"):
            said = self._commands.luksrotctl("--direct", "reconcile", self._name)
            check(said.strip() == f"{self._name}: clean", "it is not clean")
            check(volume.read(self._volume).content == after.content, "the second reconcile has changed the volume")

    # -- what is checked --------------------------------------------------------------------------------------------

    def _is_at(self, generation: int) -> None:
        """The volume is clean, and has one pair, of that generation, whose key opens it; so does the main key."""
        now = volume.read(self._volume)
        check(now.pair.agree, "the header copies differ")
        check(now.token().wipe == (), "a wipe intent is left")
        pairs = self._pairs(self._volume)
        check(
            [found for found, _ in pairs] == [generation], f"the pairs are {pairs}, not one of generation {generation}"
        )
        check(now.token().data == json.loads(DATA[generation - 1]), "the associated data is wrong")
        opening = self._openers(now)
        check(opening == {MAIN, BACKUPS[generation - 1]}, f"what opens is {', '.join(sorted(opening))}")

    def _is_gone(self, before: Image, after: Image, key: str) -> None:
        """Not even the header of ``before`` makes ``key`` open what is there now."""
        left = volume.sectors_left(before, after, before.area())
        check(left == 0, f"{left} sectors of its area are not overwritten")
        check(key in self._openers(before), "the key did not open before either")
        opening = self._openers(after.with_header_of(before))
        check(opening == {MAIN}, f"with the old header, what opens is {', '.join(sorted(opening))}")

    def _openers(self, image: Image) -> set[str]:
        """The keys that open the volume, tried on a copy."""
        self._scratch.write_bytes(image.content)
        return {key for key in (MAIN, *BACKUPS) if self._commands.opens(self._scratch, key)}

    def _pairs(self, path: Path) -> list[tuple[int, str]]:
        """Generation and keyslot of each token of ours, by luksDump; each keyslot must be there, and in one token."""
        metadata = self._commands.dump(path)
        pairs = []
        for token in metadata["tokens"].values():
            if token["type"] == names.TOKEN_TYPE:
                check(len(token["keyslots"]) == 1, f"a token names {len(token['keyslots'])} keyslots")
                check(token["keyslots"][0] in metadata["keyslots"], "a token names a keyslot that is not there")
                pairs.append((token["generation"], token["keyslots"][0]))
        ours = {keyslot for _, keyslot in pairs}
        check(sorted(metadata["keyslots"].keys() - ours) == ["0"], "there are keyslots that nobody has made")
        return pairs

    # -- what is shown ----------------------------------------------------------------------------------------------

    def _table(self, title: str, before: Image, after: Image) -> None:
        columns = []
        for image in (before, after):
            self._scratch.write_bytes(image.content)
            columns.append(self._described(self._scratch))
        keyslots = sorted(set().union(*columns))
        rows = [(keyslot, *(column.get(keyslot, "-") for column in columns)) for keyslot in keyslots]
        rows.append(("sequence number", *(str(image.pair.winner.header.seqid) for image in (before, after))))
        self._screen.table(title, ("KEYSLOT", "BEFORE", "AFTER"), rows)

    def _described(self, path: Path) -> dict[str, str]:
        metadata = self._commands.dump(path)
        described = dict.fromkeys(metadata["keyslots"], "ordinary passphrase")
        for number, token in metadata["tokens"].items():
            for keyslot in token["keyslots"]:
                about = f"{token['name']}, generation {token['generation']}, {json.dumps(token['data'])}"
                described[keyslot] = f"token {number}: {about}"
        return described

    def _show_copies(self, image: Image) -> None:
        rows = []
        for which in Which:
            copy, alone = image.copy(which), image.alone(which)
            token = alone.token()
            opening = ", ".join(sorted(self._openers(alone)))
            intent = ", ".join(f"{extent.size} bytes at {extent.offset}" for extent in token.wipe) or "-"
            pair = f"generation {token.generation}, keyslot {token.keyslots[0]}"
            rows.append((which, str(copy.header.seqid), pair, intent, opening))
        self._screen.table(
            "the header copies, each alone", ("COPY", "SEQUENCE", "PAIR", "WIPE INTENT", "OPENED BY"), rows
        )
