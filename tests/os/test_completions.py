# SPDX-License-Identifier: GPL-2.0-or-later
"""What bash, zsh and fish offer behind ``luksrotctl``: the checked-in files, in the shells themselves."""

import importlib
import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.kernel import LoopDevice, die_with_parent
from tests.support.makeimage import make_image

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "packaging" / "completions"
SECONDS = 60
#: Instead of lsblk, and instead of all that completing must not run.
LSBLK = """#!/bin/sh
printf '%s\\n' '/dev/sda  ' '/dev/sda1 ext4 1.0' '/dev/sda2 crypto_LUKS 2'
printf '%s\\n' '/dev/sdb crypto_LUKS 1' '/dev/sdc9 crypto_LUKS 2'
"""
FORBIDDEN = ("luksrotctl", "cryptsetup", "busctl", "pkexec", "sudo")
#: How each shell is made to tell what its line has become.
TELL = {
    "bash": """
source /usr/share/bash-completion/bash_completion
source {files}/luksrotctl
tell() {{ printf 'LINE<%s>\\n' "$READLINE_LINE"; }}
bind -x '"\\C-t": tell'
echo READY
""",
    "zsh": """
fpath=({files} $fpath)
autoload -Uz compinit
compinit -u -d {scratch}/dump
tell() {{ print -r "LINE<$BUFFER>" }}
zle -N tell
bindkey '^T' tell
echo READY
""",
}
ARGV = {
    "bash": ("bash", "--norc", "--noprofile", "-i"),
    "zsh": ("zsh", "-f", "-i", "-o", "NO_PROMPT_CR", "-o", "NO_PROMPT_SP", "-o", "NO_BEEP"),
}


@pytest.fixture
def scratch(tmp_path):
    """Where the shell is: files to be offered, and a PATH with traps in it."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "lsblk").write_text(LSBLK)
    for name in FORBIDDEN:
        (programs / name).write_text(f"#!/bin/sh\necho {name} >>{tmp_path}/was-run\n")
    for path in programs.iterdir():
        path.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    for name in ("backup.key", "escrow.json", "disk.img"):
        (work / name).write_text("")
    return tmp_path


def environment(scratch):
    path = f"{scratch / 'programs'}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(scratch), "TERM": "dumb", "LANG": "C.UTF-8", "XDG_CONFIG_HOME": str(scratch)}


class Terminal:
    """A shell on a terminal; what it says is read up to what is waited for."""

    def __init__(self, shell, scratch):
        self.fd, theirs = pty.openpty()
        self.process = subprocess.Popen(
            ARGV[shell],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=scratch / "work",
            env=environment(scratch),
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - takes no lock
        )
        os.close(theirs)
        script = scratch / "script"
        script.write_text(TELL[shell].format(files=FILES, scratch=scratch))
        os.write(self.fd, f". {script}\n".encode())
        self.wait_for(r"READY\r\n")

    def wait_for(self, pattern):
        said = ""
        deadline = time.monotonic() + SECONDS
        while not (found := re.search(pattern, said)):
            ready, _, _ = select.select([self.fd], [], [], max(deadline - time.monotonic(), 0))
            assert ready, said
            said += os.read(self.fd, 65536).decode(errors="replace")
        return found

    def completed(self, line):
        """The line after a TAB at its end."""
        os.write(self.fd, f"\x15{line}\t\x14".encode())
        return self.wait_for(r"LINE<([^>]*)>")[1]

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture(params=sorted(ARGV))
def terminal(request, scratch):
    terminal = Terminal(request.param, scratch)
    yield terminal
    terminal.close()


#: What is typed → what a TAB makes of it, in every shell.
TYPED = {
    "luksrotctl rot": "luksrotctl rotate ",
    "luksrotctl --direct --json rec": "luksrotctl --direct --json rec",
    "luksrotctl --direct enr": "luksrotctl --direct enroll ",
    "luksrotctl header res": "luksrotctl header restore ",
    "luksrotctl rotate --new": "luksrotctl rotate --new-keyfile ",
    "luksrotctl rotate --key-file ba": "luksrotctl rotate --key-file backup.key ",
    "luksrotctl rotate -d ba": "luksrotctl rotate -d backup.key ",
    "luksrotctl rotate --pbkdf a": "luksrotctl rotate --pbkdf argon2i",
    "luksrotctl rotate --engine=st": "luksrotctl rotate --engine=stepwise ",
    "luksrotctl rotate --token ": "luksrotctl rotate --token any ",
    "luksrotctl rotate --name ": "luksrotctl rotate --name backup ",
    "luksrotctl set-data --data @es": "luksrotctl set-data --data @escrow.json ",
    "luksrotctl show /dev/sda": "luksrotctl show /dev/sda2 ",
    "luksrotctl show --json di": "luksrotctl show --json disk.img ",
    "luksrotctl finish /dev/sda2 /dev/sdc": "luksrotctl finish /dev/sda2 /dev/sdc9 ",
    "luksrotctl --direct header backup /dev/sda2 ba": "luksrotctl --direct header backup /dev/sda2 backup.key ",
    "luksrotctl show /dev/sda2 /dev/sdc": "luksrotctl show /dev/sda2 /dev/sdc",
    "luksrotctl enroll --expi": "luksrotctl enroll --expi",
    "luksrotctl list /dev/sda": "luksrotctl list /dev/sda",
}


def test_a_tab_completes(terminal, scratch):
    # zsh puts a = behind an option that takes a value, and takes it back when a blank is typed.
    found = {typed: re.sub(r"=$", " ", terminal.completed(typed)) for typed in TYPED}
    assert found == TYPED
    assert not (scratch / "was-run").exists()


def offered_by_fish(scratch, line):
    """What fish offers, without descriptions."""
    script = f"source {FILES}/luksrotctl.fish; complete --do-complete '{line}'"
    argv = ["fish", "--no-config", "--command", script]
    done = subprocess.run(
        argv, cwd=scratch / "work", env=environment(scratch), capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return {one.partition("\t")[0] for one in done.stdout.splitlines()}


@pytest.mark.parametrize("typed", TYPED)
def test_fish_offers_the_same(scratch, typed):
    last = TYPED[typed].rpartition(" ")[2] or TYPED[typed].split(" ")[-2]
    offered = offered_by_fish(scratch, typed)
    if TYPED[typed] == typed:
        # Two that begin alike, or nothing.
        assert len(offered) != 1
    else:
        assert {one for one in offered if one.startswith(last)} == offered
        assert offered
    assert not (scratch / "was-run").exists()


def of_packaging(name):
    """The module of a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "packaging")
        return importlib.import_module(name)


MADE, VOLUMES = of_packaging("shell_completions"), of_packaging("shells.verbs").VOLUMES


@pytest.mark.parametrize("name", MADE.SHELLS)
def test_the_files_are_those_that_the_parser_makes(name):
    assert (FILES / name).read_text() == MADE.made()[name], "run make completions"


def test_every_verb_offers_all_of_its_options(scratch):
    for verb in MADE.verbs_of(MADE.build_parser()):
        names = {name for option in verb.options for name in option.names}
        assert offered_by_fish(scratch, f"luksrotctl {verb.name} -".replace("  ", " ")) >= {
            name for name in names if name.startswith("--")
        }
        assert offered_by_bash(scratch, *verb.name.split(), "-") == names


def offered_by_bash(scratch, *words):
    """What bash offers for the last word."""
    script = f"""
    source /usr/share/bash-completion/bash_completion; source {FILES}/luksrotctl
    COMP_WORDS=(luksrotctl "$@"); COMP_CWORD=$#; COMP_LINE="${{COMP_WORDS[*]}}"; COMP_POINT=${{#COMP_LINE}}
    _luksrotctl; printf '%s\\n' "${{COMPREPLY[@]}}" """
    argv = ["bash", "--norc", "-c", script, "bash", *words]
    done = subprocess.run(
        argv, cwd=scratch / "work", env=environment(scratch), capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return set(done.stdout.split())


def test_lsblk_shows_volumes_of_luks2(bed, tmp_path):
    """The real one: of a real volume, that the real udev has looked at."""
    with LoopDevice(make_image(tmp_path / "volume")) as loop:
        subprocess.run(["udevadm", "trigger", "--settle", loop.path], check=True)
        shown = subprocess.run(["sh", "-c", VOLUMES], capture_output=True, text=True, check=True)
        assert str(loop.path) in shown.stdout.splitlines()
