# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever goes wrong: one clear message, the exit status of the contract, and a device that is as it was."""

import asyncio
import json
import os
import subprocess
import sys

import pytest

from luksrotd.host.blockdev import BlockDevices
from luksrotd.host.locks import HostLocks
from luksrotd.ports import DeviceRef
from tests.ctl.conftest import BACKUP, CHEAP, LUKSROTCTL, NEXT, ctl, environment, fails, loop_device, works
from tests.support.makeimage import KEY, import_token, run


@pytest.fixture
def rotate(enrolled, secret):
    """A command line that would work."""
    return ("--direct", "rotate", enrolled, "-d", secret(KEY), "--new-keyfile", secret(NEXT), *CHEAP)


@pytest.fixture
def unchanged(enrolled):
    before = enrolled.read_bytes()
    yield
    assert enrolled.read_bytes() == before


@pytest.mark.usefixtures("unchanged")
def test_wrong_key(enrolled, secret):
    wrong = ("--direct", "rotate", enrolled, "-d", secret(b"wrong"), "--new-keyfile", secret(NEXT), *CHEAP)
    assert fails(1, *wrong) == {
        "error": "WrongCredential",
        "message": fails(1, *wrong)["message"],
        "outcome": "unchanged",
    }
    done = ctl(*wrong)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"luksrotctl: cannot ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("extra", "status", "code"),
    [
        (["--data", "[1]"], 2, "InvalidArgs"),
        (["--data", "{"], 2, "InvalidArgs"),
        (["--data", "@/nowhere"], 2, "InvalidArgs"),
        (["--pbkdf-memory", "64"], 2, "InvalidArgs"),
        (["--pbkdf", "scrypt"], 2, "InvalidArgs"),
        (["--pbkdf-force-iterations", "many"], 2, "InvalidArgs"),
        (["--pbkdf-force-iterations", "1"], 2, "InvalidArgs"),
        (["--generate"], 2, "InvalidArgs"),
        (["--output", "F"], 2, "InvalidArgs"),
        (["--new-key", "F"], 2, "InvalidArgs"),
        (["--name", "other"], 1, "UnknownKey"),
        (["-d", "/nowhere"], 1, "SecretRejected"),
        (["-d", "/"], 1, "SecretRejected"),
        (["-d", "/dev/null"], 1, "SecretRejected"),
        (["-d", "/dev/zero"], 1, "SecretRejected"),
        (["-d", "-", "--new-keyfile", "-"], 2, "InvalidArgs"),
        (["--header", "/nowhere"], 1, "UnknownDevice"),
        (["--data", '{"long": "' + 13000 * "x" + '"}'], 1, "MetadataFull"),
    ],
)
def test_refused_options(rotate, extra, status, code):
    assert fails(status, *rotate, *extra)["error"] == code


@pytest.mark.usefixtures("unchanged")
def test_a_name_that_is_taken(enrolled, secret):
    enroll = ("--direct", "enroll", enrolled, "-d", secret(KEY), "--new-keyfile", secret(NEXT), *CHEAP)
    assert fails(1, *enroll)["error"] == "KeyExists"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["show"],
        ["show", "a", "b"],
        ["reconcile"],
        ["reconcile", "--all", "a"],
        ["reconcile", "a", "b", "--header", "c"],
        ["list", "--dir"],
    ],
)
def test_wrong_usage(arguments):
    assert fails(2, *arguments)["error"] == "InvalidArgs"
    done = ctl(*arguments)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"--help" in done.stderr or b"--all" in done.stderr or b"--header" in done.stderr


def test_devices_that_are_none(tmp_path, secret):
    empty, luks1 = tmp_path / "empty", tmp_path / "luks1"
    empty.write_bytes(b"")
    plain = secret(bytes(1 << 20))
    with luks1.open("wb") as file:
        file.truncate(4 << 20)
    run("luksFormat", "--type=luks1", "--pbkdf-force-iterations=1000", "--key-file=-", str(luks1), stdin=KEY)
    assert fails(1, "--direct", "show", tmp_path / "missing")["error"] == "UnknownDevice"
    assert fails(1, "--direct", "show", tmp_path)["error"] == "UnknownDevice"
    assert fails(1, "--direct", "show", "/dev/null")["error"] == "UnknownDevice"
    assert fails(1, "--direct", "show", empty)["error"] == "UnknownDevice"
    assert fails(1, "--direct", "show", plain)["error"] == "UnknownDevice"
    assert fails(1, "--direct", "show", luks1)["error"] == "NotLuks2"
    assert fails(1, "--direct", "show", "UUID=00000000-0000-4000-8000-000000000000")["error"] == "UnknownDevice"
    assert fails(1, "--direct", "show", "00000000-0000-4000-8000-000000000000")["error"] == "UnknownDevice"
    assert fails(1, "--direct", "show", "UUID=../../../etc")["error"] == "UnknownDevice"
    assert fails(1, "--direct", "show", b"\xff\xfe".decode(errors="surrogateescape"))["error"] == "UnknownDevice"
    assert ctl("--direct", "show", b"\xff\xfe".decode(errors="surrogateescape")).returncode == 1


@pytest.mark.usefixtures("unchanged")
def test_read_only_device(enrolled, secret):
    with loop_device(enrolled, 512, "--read-only") as node:
        arguments = ("-d", secret(KEY), "--new-keyfile", secret(NEXT), *CHEAP)
        assert fails(1, "--direct", "rotate", node, *arguments)["error"] == "DeviceFailed"


@pytest.mark.usefixtures("unchanged")
def test_busy(rotate, enrolled):
    async def while_locked():
        device = BlockDevices().open(DeviceRef(str(enrolled)))
        try:
            async with HostLocks().job(device):
                return await asyncio.to_thread(fails, 6, *rotate)
        finally:
            device.close()

    assert asyncio.run(while_locked())["error"] == "Busy"


@pytest.mark.usefixtures("unchanged")
def test_forbidden_to_the_user(enrolled):
    enrolled.chmod(0o600)
    # Everything is imported beforehand: an unprivileged user may not even be able to read this source tree.
    code = (
        "import os, sys, luksrotd.ctl.local, luksrotd.ctl.__main__ as main\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    for arguments in (["show", str(enrolled)], ["list"]):
        command = [sys.executable, "-c", code, "--direct", "--json", *arguments]
        done = subprocess.run(command, env=environment(), capture_output=True, check=False)
        assert done.returncode == 5, (done.stdout, done.stderr)
        assert json.loads(done.stdout)["error"] == "NotAuthorized"


def test_needs_a_person(enrolled, rotate):
    token = {"type": "luksrotd", "keyslots": [], "name": "backup", "generation": 1, "data": {}}
    import_token(enrolled, token, 7)
    before = enrolled.read_bytes()
    assert fails(3, *rotate)["error"] == "NeedsPerson"
    assert enrolled.read_bytes() == before


def test_no_bus():
    nowhere = {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent"}
    document = fails(1, "list", env=nowhere)
    assert document["error"] == "Unreachable"
    assert "use --direct as root" in document["message"]
    assert fails(1, "list", env={"DBUS_SYSTEM_BUS_ADDRESS": "nonsense"})["error"] == "Unreachable"


def test_images_and_detached_headers_need_direct(enrolled):
    nowhere = {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent"}
    assert "--direct" in fails(1, "show", enrolled, env=nowhere)["message"]
    assert "--direct" in fails(2, "show", "/dev/null", "--header", enrolled, env=nowhere)["message"]


@pytest.mark.usefixtures("unchanged")
def test_result_that_nobody_reads(enrolled):
    for arguments in (["show", enrolled], ["--help"], ["show", enrolled, "--json"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = ctl("--direct", *arguments, stdout=writer)
        os.close(writer)
        assert done.stderr == b""
        assert done.returncode in (0, 1)


def test_result_that_nobody_reads_changes_no_exit_status(enrolled, rotate):
    with open("/dev/full", "wb") as full:  # noqa: PTH123 - a device
        done = ctl(*rotate, stdout=full)
    assert done.returncode == 0
    assert b"cannot write the result" in done.stderr
    works("--direct", "verify", enrolled, "-d", "-", stdin=NEXT)


@pytest.mark.usefixtures("unchanged")
def test_closed_standard_streams(enrolled):
    closed = 'exec "$@" >&- 2>&- <&-'
    command = ["sh", "-c", closed, "sh", *LUKSROTCTL, "--direct", "rotate", str(enrolled), "-d", "-", "--generate"]
    assert subprocess.run(command, env=environment(), check=False).returncode == 1


def test_verify(enrolled, secret):
    works("--direct", "verify", enrolled, "-d", secret(BACKUP))
    done = ctl("--direct", "verify", enrolled, "-d", secret(KEY), "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"device": str(enrolled), "name": "backup", "matches": False}
    assert fails(1, "--direct", "verify", enrolled, "-d", secret(KEY), "--name", "no")["error"] == "UnknownKey"
