# SPDX-License-Identifier: GPL-2.0-or-later
"""The catalog that `journalctl -x` explains entries with: held against the code, and read by the real journalctl."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from luksrotd.errors import LuksrotdError
from luksrotd.host.journal import PREFIX, SystemdJournal, name_of
from luksrotd.names import MessageId
from luksrotd.ports import Caller
from luksrotd.rotation.reconcile import Action, Code, Finding
from luksrotd.rotation.view import view
from luksrotd.service.audit import Audit
from luksrotd.service.headers import Headers
from luksrotd.service.suspects import Suspects
from tests.support import kernel
from tests.support.crashverbs import OTHER, VERBS
from tests.support.simengine import UUID, make_volume
from tests.support.simfiles import SimFiles
from tests.support.simulation import MAIN, OLD, Simulation, run, secrets

ROOT = Path(__file__).resolve().parents[2]
CATALOG = ROOT / "systemd" / "luksrotd.catalog"
DATABASE = "/var/lib/systemd/catalog"


def sections():
    """Of each message id, its header fields and its text."""
    found = {}
    for section in re.split(r"(?m)^-- ", CATALOG.read_text(encoding="utf-8"))[1:]:
        first, _, rest = section.partition("\n")
        head, _, text = rest.partition("\n\n")
        assert first not in found, f"{first} is there twice"
        found[first.strip()] = (dict(line.split(": ", 1) for line in head.splitlines()), text)
    return found


def test_every_kind_of_entry_is_explained_and_no_other():
    assert sections().keys() == set(MessageId)
    assert len(set(MessageId)) == len(MessageId)
    assert all(re.fullmatch(r"[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}", message_id) for message_id in MessageId)


@pytest.mark.parametrize("message_id", MessageId, ids=lambda message_id: message_id.name)
def test_every_section_is_complete(message_id):
    head, text = sections()[message_id]
    assert head.keys() == {"Subject", "Defined-By", "Documentation"}
    assert head["Defined-By"] == "luksrotd"
    assert text.strip()
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.fixture(scope="module")
def recorded():
    """Entries of every kind, as the code makes them: message id → the fields of all of that kind."""
    entries = []

    def simulation():
        made = Simulation(make_volume([MAIN, OTHER]))
        entries.append(made.journal.entries)
        return made

    for verb in VERBS.values():
        one = simulation()
        verb.prepare(one)
        verb.operate(one)
    run(Headers(one.host, SimFiles()).backup(one.ref, "backup"))
    suspects = Suspects(one.host)
    run(suspects.accept(one.ref, 1))
    with secrets(unlock=MAIN) as sources:
        run(suspects.remove(one.ref, 1, sources))
    for gone in range(6):
        one = simulation()
        one.enroll(MAIN, OLD)
        one.disk.faults.gone_at_write = one.disk.writes + gone
        with pytest.raises(LuksrotdError):
            VERBS["rotation"].operate(one)
    one = simulation()
    with pytest.raises(LuksrotdError):
        one.enroll(OLD, OLD)
    audit = Audit(one.host)
    findings = [Finding(Code.REQUIREMENTS, Action.PERSON, "one"), Finding(Code.KEYSLOT_SUSPECT, Action.NOTE, "two")]
    audit.found(one.ref, view(one.pair), findings)
    audit.denied(Caller(":1.5", 1000, client="busctl"), "org.luksrotd1.rotate", {})
    audit.foreign_change(UUID, "/dev/sim0", 3, 5, "newer")
    audit.configured()
    audit.misconfigured("line 3")
    audit.started("1.0")
    audit.stopped()
    found = {}
    for entry in (entry for some in entries for entry in some):
        found.setdefault(entry.fields["message_id"], []).append({name_of(name) for name in entry.fields})
    return found


@pytest.mark.parametrize("message_id", MessageId, ids=lambda message_id: message_id.name)
def test_what_is_explained_by_a_field_has_the_field(recorded, message_id):
    head, text = sections()[message_id]
    wanted = set(re.findall(r"@(\w+)@", head["Subject"] + text))
    assert message_id in recorded
    for fields in recorded[message_id]:
        assert wanted <= fields


def test_every_field_is_in_the_manual(recorded):
    manual = (ROOT / "docs" / "man" / "luksrotd.8.scd").read_text(encoding="utf-8")
    named = set(re.findall(r"\*LUKSROTD_(\w+)=\*", manual))
    fields = {field for some in recorded.values() for fields in some for field in fields}
    given = {field.removeprefix(PREFIX) for field in fields if field.startswith(PREFIX)}
    assert named == given | {"HEADER", "UNIT", "JOB", "GROUP", "ENGINE", "UNRECORDED", "OPERATION"}


@pytest.fixture
def database(bed, tmp_path):
    """The machine's own catalog with ours, in place of the machine's own."""
    kernel.mount(tmp_path, DATABASE, flags=kernel.MS_BIND)
    own = Path("/usr/lib/systemd/catalog")
    root = tmp_path / "root"
    (root / "usr/lib/systemd/catalog").mkdir(parents=True)
    for path in (CATALOG, own / "systemd.catalog"):
        (root / "usr/lib/systemd/catalog" / path.name).write_bytes(path.read_bytes())
    subprocess.run(["journalctl", f"--root={root}", "--update-catalog"], check=True)
    (tmp_path / "database").write_bytes((root / "var/lib/systemd/catalog/database").read_bytes())
    yield
    kernel.unmount(DATABASE)


def test_journalctl_explains_a_rotation(database):
    simulation = Simulation(make_volume([MAIN, OTHER]))
    VERBS["rotation"].prepare(simulation)
    caller = Caller(":1.9", 1000, client="busctl")
    simulation = simulation_with(simulation, caller)
    VERBS["rotation"].operate(simulation)
    subprocess.run(["journalctl", "--sync"], check=True)
    argv = ["journalctl", "-D", "/run/log/journal", "-x", "--no-pager", "-n", "1", f"MESSAGE_ID={MessageId.ROTATED}"]
    shown = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    plain = " ".join(line.removeprefix("░░").strip() for line in shown.splitlines())
    assert "luksrotd" in plain
    assert "Subject: Key backup rotated" in plain
    assert (
        f"The managed key backup of the volume {UUID} (/dev/sim0) was replaced: generation 2 is in keyslot 3" in plain
    )
    assert "Keyslots before: 0,1,2; now: 0,1,3." in plain
    assert "Done for user 1000, who used busctl." in plain
    assert "@" not in plain


def simulation_with(simulation, caller):
    """The same volume, recorded in the real journal, and worked on by ``caller``."""
    other = Simulation(simulation.disk.content)
    other.host = replace(other.host, journal=SystemdJournal(), myself=caller)
    other.volumes = type(other.volumes)(other.host)
    return other
