# SPDX-License-Identifier: GPL-2.0-or-later
"""Workers that misbehave: taken over, crashed, or not workers at all."""

import os

import pytest

from luksrotd.errors import EngineCrashed, EngineError, InvalidRequest
from luksrotd.host.worker import WorkerEngine
from tests.engine.processes import OPERATIONS, ended, impostor, resources, worker

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("b'nonsense\\n'", "not JSON"),
        ("b'[' * 100000 + b'\\n'", "not JSON"),
        ("b'[1]\\n'", "not an object"),
        ("b'{}\\n'", "malformed reply"),
        ('b\'{"ok":true,"result":[]}\\n\'', "the metadata is not an object"),
        ('b\'{"ok":false,"error":"Conflict","message":"x"}\\n\'', "it says 'Conflict'"),
        ('b\'{"ok":false,"error":"EngineFailed","message":5}\\n\'', "malformed reply"),
        ("b'x' * (40 << 20)", "endless reply"),
    ],
)
async def test_replies_that_are_none(shadow, tmp_path, reply, why):
    engine = impostor(tmp_path, f"channel.sendall({reply})\nlines.readline()")
    async with worker(shadow, engine) as session:
        with pytest.raises(EngineError, match=f"^cannot understand the worker: {why}$"):
            await session.load()
        with pytest.raises(EngineError, match=r"after it failed"):
            await session.load()


@pytest.mark.parametrize(
    ("name", "result", "why"),
    [("unlock", "7.5", "not the keyslot"), ("unlock", "true", "not the keyslot"), ("opens", "1", "neither yes nor no")],
)
async def test_results_of_another_type(shadow, tmp_path, name, result, why):
    engine = impostor(tmp_path, f'channel.sendall(b\'{{"ok":true,"result":{result}}}\\n\')\nlines.readline()')
    async with worker(shadow, engine) as session:
        with pytest.raises(EngineError, match=why):
            await OPERATIONS[name](session)


async def test_message_of_a_worker_is_cut_and_cleaned(shadow, tmp_path):
    engine = impostor(
        tmp_path,
        r"""channel.sendall(b'{"ok":false,"error":"EngineFailed","message":"\\u001b[2J' + b"x" * 9999 + b'"}\n')
lines.readline()""",
    )
    async with worker(shadow, engine) as session:
        with pytest.raises(EngineError, match=r"^\?\[2Jx{496}$"):
            await session.load()


async def test_exit_status_and_the_end_of_stderr(shadow, tmp_path):
    engine = impostor(tmp_path, "os.write(2, b'x' * 9000 + b' the end\\n')\nos._exit(3)")
    async with worker(shadow, engine) as session:
        with pytest.raises(EngineCrashed, match=r"^cannot go on: the worker ended with status 3\n") as caught:
            await session.load()
    (note,) = caught.value.__notes__
    assert note.startswith("the worker wrote: xxx")
    assert note.endswith("x the end")
    assert len(note) < 2100


async def test_bug_in_the_worker_leaves_its_trace_for_the_journal_only(shadow):
    async with worker(shadow) as session:
        with pytest.raises(Exception, match=r"^cannot go on: KeyError in the worker\n") as caught:
            await session._call({"op": "opens"}, 60)
    assert caught.value.code == "Internal"
    assert "Traceback" not in str(caught.value)
    assert "Traceback" in caught.value.__notes__[0]


async def test_unknown_operation(shadow):
    async with worker(shadow) as session:
        with pytest.raises(InvalidRequest, match=r"unknown operation"):
            await session._call({"op": "format"}, 60)


async def test_forked_child_is_killed_with_the_worker(shadow, tmp_path):
    body = """
    child = os.fork()
    if child == 0:
        channel.close()
        while True:
            time.sleep(60)
    channel.sendall(b'{"ok":true,"result":{"child":%d}}\\n' % child)
    lines.readline()
    """
    async with worker(shadow, impostor(tmp_path, body)) as session:
        pidfd = os.pidfd_open((await session.load())["child"])
    await ended(pidfd)


async def test_interpreter_that_is_not_there(shadow):
    before = resources()
    with pytest.raises(EngineError, match=r"^cannot start a worker: No such file or directory$"):
        async with worker(shadow, WorkerEngine(python="/nonexistent")):
            pass
    assert resources() == before
