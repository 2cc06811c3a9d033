# SPDX-License-Identifier: GPL-2.0-or-later
"""The record, read back over the bus: real journald, and whoever wants to write into it what did not happen."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from dbus_next.signature import Variant

from luksrotd import names
from luksrotd.bus.history import NUMBERS
from luksrotd.host.process import myself
from luksrotd.names import MessageId
from tests.support import daemon_process
from tests.support.busclient import BusClient, CallFailed
from tests.support.daemon_process import BACKUP, NEW, OLD, ended, settled, start
from tests.support.testbed import PROJECT

pytestmark = pytest.mark.asyncio
INVALID = "org.freedesktop.DBus.Error.InvalidArgs"


async def sync():
    """Return when journald has written what it was sent."""
    await asyncio.to_thread(subprocess.run, ["journalctl", "--sync"], check=True)


async def entries(client, **options):
    """The fields of the records, without what differs from run to run."""
    await sync()
    (found,) = await client.call(names.ROOT_PATH, names.MANAGER_INTERFACE, "GetHistory", "a{sv}", [options])
    return [{name: variant.value for name, variant in entry.items()} for entry in found]


async def refused(client, **options):
    with pytest.raises(CallFailed) as caught:
        await entries(client, **options)
    return caught.value.name


async def test_history_tells_what_was_done_by_whom_and_how_it_ended(bed, daemon, client, volume):
    data = '{"planted": "associated-data-77"}'
    enrolled = await start(client, volume.path, "Enroll", new=BACKUP, data=Variant("s", data))
    assert (await ended(client, enrolled))["State"] == "finished"
    rotated = await start(client, volume.path, data=Variant("s", data))
    assert (await ended(client, rotated))["State"] == "finished"
    failed = await start(client, volume.path, old=b"planted-wrong-secret-1")
    assert (await ended(client, failed))["State"] == "failed"
    seqid = (await settled(client, volume.path))["Generation"]

    history = await entries(client, device=Variant("o", volume.path))
    assert [entry["kind"] for entry in history] == ["enroll", "rotate", "rotate"]
    assert [entry["message_id"] for entry in history] == [MessageId.ENROLLED, MessageId.ROTATED, MessageId.FAILED]
    assert [entry["job"] for entry in history] == [int(job.rpartition("/")[2]) for job in (enrolled, rotated, failed)]
    me = Path("/proc/self/comm").read_text().strip()  # noqa: ASYNC240 -- never blocks
    for entry in history:
        assert (entry["uuid"], entry["node"], entry["key"]) == (volume.uuid, volume.node, "backup")
        assert (entry["uid"], entry["client"], entry["sender"]) == (0, me, client.name)
    assert [(entry["outcome"], entry.get("error")) for entry in history] == [
        ("committed", None), ("committed", None), ("unchanged", "WrongCredential"),
    ]  # fmt: skip
    assert [(entry["generation_before"], entry["generation"]) for entry in history] == [(0, 1), (1, 2), (2, 2)]
    assert [(entry["seqid_before"], entry["seqid_after"]) for entry in history] == [
        (3, history[1]["seqid_before"]), (history[0]["seqid_after"], seqid), (seqid, seqid),
    ]  # fmt: skip
    assert [entry["keyslots_after"] for entry in history] == ["0,1", "0,2", "0,2"]
    times = [entry["time"] for entry in history]
    assert times == sorted(times)

    kinds = lambda found: [entry["kind"] for entry in found]  # noqa: E731 -- as short as its use
    assert kinds(await entries(client, uuid=Variant("s", volume.uuid.upper()))) == ["enroll", "rotate", "rotate"]
    assert kinds(await entries(client, uuid=Variant("s", volume.uuid), limit=Variant("u", 2))) == ["rotate", "rotate"]
    assert kinds(
        await entries(
            client,
            device=Variant("o", volume.path),
            since=Variant("t", times[0]),
            until=Variant("t", times[1]),
        )
    ) == ["enroll"]
    assert kinds(await entries(client, device=Variant("o", volume.path), since=Variant("t", times[2] + 1))) == []
    assert "started" in [entry.get("kind") for entry in await entries(client)]
    journal = await asyncio.to_thread(
        subprocess.run, ["journalctl", "-D", "/run/log/journal", "-o", "export"], capture_output=True, check=True
    )
    assert volume.uuid.encode() in journal.stdout
    for planted in (b"associated-data-77", b"planted-wrong-secret-1", OLD, BACKUP, NEW):
        assert planted not in journal.stdout


async def test_history_survives_a_restart_and_the_volume(bed, client, volume):
    async with daemon_process.running(bed, client):
        await daemon_process.appeared(client, volume.path)
        job = await start(client, volume.path, "Enroll", new=BACKUP)
        assert (await ended(client, job))["State"] == "finished"
    volume.detach()
    async with daemon_process.running(bed, client):
        (entry,) = await entries(client, uuid=Variant("s", volume.uuid))
        assert (entry["kind"], entry["outcome"]) == ("enroll", "committed")
        recent = [one["kind"] for one in await entries(client, limit=Variant("u", 4))]
        assert recent[-2:] == ["stopped", "started"]


async def test_what_is_done_without_the_daemon_is_history_too(bed, daemon, client, volume, tmp_path):
    (tmp_path / "old").write_bytes(OLD)
    (tmp_path / "new").write_bytes(NEW)
    argv = [sys.executable, "-m", "luksrotd.ctl", "--direct", "enroll", volume.node, "--key-file", tmp_path / "old"]
    argv += ["--new-keyfile", tmp_path / "new", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
    options = {"cwd": PROJECT, "env": daemon_process.ENVIRONMENT, "stdin": subprocess.DEVNULL}
    await asyncio.to_thread(subprocess.run, [*map(str, argv)], check=True, capture_output=True, **options)
    (entry,) = [one for one in await entries(client, uuid=Variant("s", volume.uuid)) if one["kind"] == "enroll"]
    assert (entry["client"], entry["uid"], entry["outcome"]) == ("luksrotctl", myself().uid, "committed")
    assert not {"job", "sender"} & entry.keys()


@pytest.fixture
def given_to(volume):
    """Have udev give the volume's node to somebody."""
    rules = Path("/run/udev/rules.d/99-others.rules")
    rules.parent.mkdir(exist_ok=True)

    def give(owner, mode):
        rules.write_text(f'KERNEL=="{Path(volume.node).name}", OWNER="{owner}", GROUP="disk", MODE="{mode}"\n')
        for command in (["control", "--reload"], ["trigger", "--settle", "--action=change", volume.node]):
            subprocess.run(["udevadm", *command], check=True)

    yield give
    give("root", "0660")
    rules.unlink()


async def test_a_node_that_root_may_not_open_is_told_of_once(bed, client, volume, given_to):
    """As in the unit, which does without CAP_DAC_OVERRIDE."""

    def reason(mode):
        whose = f"it belongs to user 65534, group 6, mode {mode}"
        return f"cannot open {volume.node}: Permission denied ({whose}): let root open it (luksrotd(8), PROBLEMS)"

    def problems(mode):
        return [["device-failed", "person", reason(mode)]]

    await asyncio.to_thread(given_to, "nobody", "0600")
    async with daemon_process.running(bed, client, prefix=daemon_process.LIKE_THE_UNITS):
        assert (await daemon_process.appeared(client, volume.path))["Problems"] == problems("0600")
        await asyncio.to_thread(given_to, "nobody", "0600")
        await asyncio.to_thread(given_to, "nobody", "0640")
        await settled(client, volume.path, Problems=problems("0640"))
        recorded = [one["message"] for one in await entries(client, uuid=Variant("s", volume.uuid))]
        assert recorded == [f"a person must decide: {reason(mode)}" for mode in ("0600", "0640")]
        await asyncio.to_thread(given_to, "root", "0600")
        await settled(client, volume.path, Problems=[])


async def test_nobody_but_root_makes_history(bed, daemon, client, volume):
    forged = {
        "MESSAGE": "key removed", "MESSAGE_ID": MessageId.REMOVED, "_UID": "0", "_SYSTEMD_UNIT": "luksrotd.service",
        "SYSLOG_IDENTIFIER": "luksrotd", "LUKSROTD_UUID": volume.uuid, "LUKSROTD_KIND": "remove", "LUKSROTD_UID": "0",
    }  # fmt: skip
    text = "".join(f"{name}={value}\n" for name, value in forged.items())
    for user in ("games", "nobody"):
        argv = ["setpriv", f"--reuid={bed.user(user).pw_uid}", "--clear-groups", "logger", "--journald"]
        await asyncio.to_thread(subprocess.run, argv, input=text.encode(), check=True)
    assert await entries(client, uuid=Variant("s", volume.uuid)) == []
    argv = ["logger", "--journald"]  # root may lie: this shows that the forgery would have worked
    await asyncio.to_thread(subprocess.run, argv, input=text.encode(), check=True)
    (entry,) = await entries(client, uuid=Variant("s", volume.uuid))
    assert (entry["kind"], entry["uid"]) == ("remove", 0)


async def test_history_is_not_for_everybody_and_the_refusal_is_recorded(bed, daemon, client, nobody, rules):
    rules("NO")
    with pytest.raises(CallFailed) as caught:
        await nobody.call(names.ROOT_PATH, names.MANAGER_INTERFACE, "GetHistory", "a{sv}", [{}])
    assert caught.value.name == names.ERROR_PREFIX + "NotAuthorized"
    entry = (await entries(client))[-1]
    assert (entry["kind"], entry["action"], entry["uid"]) == ("denied", names.ACTION_HISTORY, nobody.uid)
    assert entry["operation"] == "GetHistory"


async def test_requests_that_are_malformed(daemon, client, volume):
    assert await refused(client, uuid=Variant("s", "x=1")) == INVALID
    assert await refused(client, device=Variant("o", "/org/luksrotd1")) == INVALID
    assert await refused(client, device=Variant("o", names.DEVICE_PATH + "/x")) == INVALID
    both = {"device": Variant("o", volume.path), "uuid": Variant("s", volume.uuid)}
    assert await refused(client, **both) == INVALID
    assert await refused(client, limit=Variant("u", 501)) == INVALID
    assert await refused(client, since=Variant("u", 1)) == INVALID
    assert await entries(client, limit=Variant("u", 0)) == []


async def test_busctl_shows_it(daemon, client, volume):
    job = await start(client, volume.path, "Enroll", new=BACKUP)
    await ended(client, job)
    await sync()
    argv = ["busctl", "--json=short", "call", names.BUS_NAME, names.ROOT_PATH, names.MANAGER_INTERFACE, "GetHistory"]
    argv += ["a{sv}", "2", "device", "o", volume.path, "limit", "u", "1"]
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, check=True)
    ((entry,),) = json.loads(done.stdout)["data"]
    assert entry["kind"] == {"type": "s", "data": "enroll"}
    assert {name: field["type"] for name, field in entry.items() if field["type"] != "s"} == {
        name: kind for name, kind in NUMBERS.items() if name in entry
    }


async def test_a_long_history_does_not_keep_others_waiting(bed, daemon, client, volume):
    """A full reply, while another client is answered all the time."""
    record = {"MESSAGE": "key rotated", "MESSAGE_ID": MessageId.ROTATED, "LUKSROTD_UUID": volume.uuid}
    fields = {f"LUKSROTD_{name.upper()}": "7" for name in (*NUMBERS, "node", "key", "unit", "client", "phase")}
    code = (
        "import json, sys; from systemd import journal\n"
        "for fields in [json.load(sys.stdin)] * 500: journal.sendv(*(f'{n}={v}' for n, v in fields.items()))"
    )
    text = json.dumps({**record, **fields})
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], input=text.encode(), check=True)
    await sync()
    options = {"uuid": Variant("s", volume.uuid), "limit": Variant("u", 500)}
    async with BusClient() as other:
        asked = asyncio.create_task(entries(client, **options))
        answered = 0
        while not asked.done():
            await other.get(names.ROOT_PATH, names.MANAGER_INTERFACE, "Version")
            answered += 1
        found = await asked
    assert len(found) == 500
    assert answered > 1
