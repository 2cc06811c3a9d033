# SPDX-License-Identifier: GPL-2.0-or-later
"""The man pages: rendered without a complaint, true of what is installed and of what stock tools make of our token."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.crashverbs import SECRETS
from tests.support.realvolume import prepared

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {path.stem: path for path in (ROOT / "docs" / "man").glob("*.scd")}
#: No file of ours lies there: it is the administrator's, or made by systemd for the unit.
OTHERS = re.compile(r".*/luksrotd\.conf\.d/.*|/etc/luksrotd/(?!luksrotd\.conf).*|/(run|var/lib)/luksrotd.*")
UNITS = sorted(path for path in (ROOT / "systemd").iterdir() if path.suffix in (".service", ".timer", ".socket"))
REFERENCE = re.compile(r"\*([\w.@-]+)\*\((\d)\)")


def run(*argv, **more):
    return subprocess.run([str(one) for one in argv], capture_output=True, text=True, check=False, **more)


@pytest.fixture(params=sorted(SOURCES))
def page(request):
    return request.param


@pytest.fixture
def rendered(page, tmp_path):
    """The page as it is installed."""
    made = run("scdoc", input=SOURCES[page].read_text())
    assert (made.returncode, made.stderr) == (0, "")
    path = tmp_path / page
    path.write_text(made.stdout)
    return path


def test_groff_and_mandoc_have_no_complaint(rendered):
    shown = run("man", "--warnings", "-E", "UTF-8", "-l", rendered)
    assert (shown.returncode, shown.stderr) == (0, "")
    linted = run("mandoc", "-T", "lint", "-W", "warning", rendered)
    # scdoc makes a paragraph under each heading, also where there is one already.
    complaints = [line for line in linted.stdout.splitlines() if "skipping paragraph macro" not in line]
    assert complaints == []


def test_the_name_is_that_of_the_file(page, rendered):
    name, _, section = page.rpartition(".")
    assert SOURCES[page].read_text().startswith(f"{name}({section})\n")
    assert run("lexgrog", rendered).stdout.startswith(f'{rendered}: "{name} - ')


def test_no_heading_comes_twice(page):
    headings = re.findall(r"(?m)^# (.*)$", SOURCES[page].read_text())
    assert len(headings) == len(set(headings))


def test_our_pages_refer_to_each_other(page):
    text = SOURCES[page].read_text()
    names = {f"{name}.{section}" for name, section in REFERENCE.findall(text)}
    ours = {name for name in names if name.startswith(("luksrot", "org.luksrotd"))}
    assert ours <= SOURCES.keys()
    *_, also = text.partition("# SEE ALSO")
    assert {f"{name}.{section}" for name, section in REFERENCE.findall(also)} >= SOURCES.keys() - {page}


def test_units_and_catalog_name_pages_that_exist():
    named = {}
    for path in (ROOT / "systemd").iterdir():
        for line in re.findall(r"(?m)^Documentation[=:](.*)", path.read_text(encoding="utf-8")):
            named.setdefault(path.name, []).extend(re.findall(r"man:([\w.@-]+)\((\d)\)", line))
    assert named.keys() >= {"luksrotd.catalog", *(path.name for path in UNITS)}
    pages = {f"{name}.{section}" for some in named.values() for name, section in some}
    assert {one for one in pages if not one.startswith(("luksrot", "org.luksrotd1"))} <= {"polkit.8"}
    assert {one for one in pages if one.startswith(("luksrot", "org.luksrotd1"))} <= SOURCES.keys()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Every path that packaging/install makes."""
    root = tmp_path_factory.mktemp("installed")
    subprocess.run([ROOT / "packaging" / "install", root], check=True)
    return {f"/{path.relative_to(root)}" for path in root.rglob("*")}


def test_what_pages_say_is_installed_is(page, installed):
    paths = {path.replace("\\", "") for path in re.findall(r"_(/[^_\s]*luksrotd[^_\s]*)_", SOURCES[page].read_text())}
    assert {path for path in paths if not OTHERS.fullmatch(path)} <= installed


def test_every_unit_is_in_the_manual():
    text = SOURCES["luksrotd.8"].read_text().partition("# UNITS")[2].partition("# CIPHERS")[0]
    assert {unit.name for unit in UNITS} <= set(re.findall(r"\*([\w@.-]+)\*", text))


def test_what_the_journal_says_is_found_among_the_problems():
    """By the words that somebody has before his eyes."""
    problems = SOURCES["luksrotd.8"].read_text().split("\n# PROBLEMS\n")[1].split("\n# ")[0]
    told = (
        "Permission denied (it belongs to user",
        "cannot hear udev, which is not in this network namespace",
        "Failed at step CREDENTIALS",
    )
    assert [words for words in told if words not in problems] == []


def test_the_daemons_options_are_in_the_manual():
    options = set(re.findall(r"--[a-z-]+", run(sys.executable, "-m", "luksrotd", "--help", cwd=ROOT).stdout))
    assert options == set(re.findall(r"\*(--[a-z-]+)\*", SOURCES["luksrotd.8"].read_text().partition("# AUTHOR")[0]))


def test_the_page_about_the_token_names_every_member():
    named = set(re.findall(r"(?m)^\*(\w+)\*$", SOURCES["luksrotd-token.7"].read_text()))
    schema = json.loads((ROOT / "docs" / "spec" / "token.schema.json").read_text())
    assert named == set(schema["$defs"]["key"]["properties"])


@pytest.fixture
def volume(tmp_path):
    """A volume with a managed key in keyslot 2, token 0; and the key files, by their names."""
    (tmp_path / "volume").write_bytes(prepared("rotation"))
    for name, secret in SECRETS.items():
        (tmp_path / name).write_bytes(secret)
    return tmp_path / "volume"


def cryptsetup(*argv):
    done = run("cryptsetup", "--batch-mode", *argv)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stock_tools_read_the_token_and_pass_it_over(volume):
    assert re.search(r"Tokens:\n  0: luksrotd\n\tKeyslot: +2\n", cryptsetup("luksDump", volume))
    token = json.loads(cryptsetup("token", "export", "--token-id", "0", volume))
    assert (token["type"], token["keyslots"], token["name"]) == ("luksrotd", ["2"], "backup")
    assert json.loads(cryptsetup("luksDump", "--dump-json-metadata", volume))["tokens"]["0"] == token
    cryptsetup("open", "--test-passphrase", "--key-slot", "2", "--key-file", volume.parent / "old", volume)


def test_a_managed_key_can_be_removed_by_hand(volume):
    key = volume.parent / "main"
    cryptsetup("luksHeaderBackup", "--header-backup-file", volume.parent / "backup", volume)
    cryptsetup("open", "--test-passphrase", "--key-slot", "0", "--key-file", key, volume)
    cryptsetup("luksKillSlot", volume, "2", "--key-file", key)
    assert json.loads(cryptsetup("token", "export", "--token-id", "0", volume))["keyslots"] == []
    cryptsetup("token", "remove", "--token-id", "0", volume)
    shown = run(sys.executable, "-m", "luksrotd.ctl", "--direct", "--json", "show", volume, cwd=ROOT)
    found = json.loads(shown.stdout)
    assert (found["keys"], found["problems"], found["ordinary_keyslots"]) == ([], [], [0, 1])
