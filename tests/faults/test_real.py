# SPDX-License-Identifier: GPL-2.0-or-later
"""Rotations on real volumes, by real libcryptsetup, while the kernel fails for real."""

import os
import resource
import shutil

import pytest

from luksrotd.errors import ConsistencyError, DeviceError, EngineCrashed, Outcome
from luksrotd.rotation.view import view
from tests.contract.conftest import loop_device, mounted, open_descriptors
from tests.engine.processes import resources
from tests.faults.real import (
    HDR_SIZE,
    NEW,
    OLD,
    Bench,
    Killing,
    Moment,
    enrolled_image,
    fill_up,
    medium,
    pair_on,
    punch,
    truth,
)
from tests.support.makeimage import KEY

WRITES = range(6)  # of a rotation: one for each phase
HEADERS = 2 * HDR_SIZE


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    directory = tmp_path_factory.mktemp("real")
    return enrolled_image(directory / "image", directory)


@pytest.fixture
def image(template, tmp_path):
    return shutil.copy(template, tmp_path / "image")


@pytest.fixture
def runtime(tmp_path):
    return tmp_path


def fails(bench, error=DeviceError):
    """The rotation fails; what is told of it is true, and nothing is leaked."""
    before, left = medium(bench.path), open_descriptors()
    with pytest.raises(error) as caught:
        bench.rotate()
    assert open_descriptors() == left
    assert caught.value.outcome is truth(before, bench.path)
    return caught.value.outcome


def recovers(bench, told):
    """Reconcile, and cryptsetup: exactly one of the keys is left, and it is the one that was told."""
    assert bench.reconcile().left == ()
    pair = pair_on(bench.path)
    key = view(pair).keys[0]
    assert pair.agree
    assert key.complete
    alive = [secret for secret in (OLD, NEW) if bench.opens(secret)]
    assert alive == [{1: OLD, 2: NEW}[key.token.generation]]
    assert told is Outcome.UNKNOWN or (alive == [OLD]) is (told is Outcome.UNCHANGED)
    assert bench.opens(KEY)
    again = medium(bench.path)
    assert bench.reconcile().found == ()
    assert medium(bench.path) == again


@pytest.mark.parametrize("arrives", [0, 512], ids=["none of it", "one sector"])
@pytest.mark.parametrize("number", WRITES)
def test_a_write_that_the_kernel_cuts_off(image, runtime, number, arrives):
    """RLIMIT_FSIZE: EFBIG, or a short write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(offset, size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (offset + arrives, before[1]))

    moment = Moment(number, limit, lambda offset, size: resource.setrlimit(resource.RLIMIT_FSIZE, before))
    bench = Bench(image, runtime, moment)
    told = fails(bench)
    assert len(moment.seen) == number + 1
    recovers(Bench(image, runtime), told)


@pytest.mark.parametrize("number", WRITES)
def test_a_flush_that_finds_no_room_under_a_loop_device(template, tmp_path, runtime, number):
    """What is written reaches the page cache, and stays there; the medium has zeros.  The machine is not restarted."""
    with mounted("tmpfs", tmp_path / "small", "size=8m") as small:
        image = shutil.copy(template, small / "image")
        with loop_device(image) as node:

            def no_room(offset, size):
                punch(image, offset, size)
                fill_up(small)

            moment = Moment(number, no_room)
            bench = Bench(node, runtime, moment)
            told = fails(bench)
            assert len(moment.seen) == number + 1
            (small / "filler").unlink()
            recovers(Bench(node, runtime), told)


def test_an_image_on_a_full_file_system(template, tmp_path, runtime):
    """The new area is a hole in the image: ENOSPC, and nothing has happened."""
    with mounted("tmpfs", tmp_path / "small", "size=8m") as small:
        image = shutil.copy(template, small / "image")
        free = view(pair_on(image)).free[0]
        punch(image, free.offset, free.size)
        filler = fill_up(small)
        bench = Bench(image, runtime)
        assert fails(bench) is Outcome.UNCHANGED
        filler.unlink()
        recovers(Bench(image, runtime), Outcome.UNCHANGED)
        Bench(image, runtime).rotate()
        assert bench.opens(NEW)


@pytest.mark.parametrize("number", WRITES)
def test_a_backing_file_that_is_cut_off_under_the_loop_device(image, runtime, number):
    """What is written makes the file longer again, as if nothing had been; everything else is an error, or zeros."""
    with loop_device(image) as node:
        bench = Bench(node, runtime, Moment(number, lambda offset, size: os.truncate(image, 0)))
        before, left = medium(node), open_descriptors()
        try:
            bench.rotate()
            told = Outcome.COMMITTED
        except (DeviceError, ConsistencyError) as error:
            told = error.outcome
        assert told is truth(before, node)
        assert open_descriptors() == left


@pytest.mark.parametrize("midway", [False, True], ids=["before", "during"])
@pytest.mark.parametrize("verb", ["rotate", "stage"])
def test_a_worker_that_is_killed_at_each_of_its_calls(image, runtime, verb, midway):
    before, header = image.read_bytes(), medium(image)
    undisturbed = Killing()
    copy = shutil.copy(image, image.with_name("copy"))
    getattr(Bench(copy, runtime, engine=undisturbed), verb)()
    assert set(undisturbed.calls) == {"load", "unlock", "apply", "opens"}
    left = resources()
    for number in range(len(undisturbed.calls)):
        engine = Killing(number, midway=midway)
        with pytest.raises(EngineCrashed, match="SIGKILL") as caught:
            getattr(Bench(image, runtime, engine=engine), verb)()
        assert caught.value.outcome is Outcome.UNCHANGED is truth(header, image)
        assert engine.calls == undisturbed.calls[: number + 1]
        assert resources() == left
    assert image.read_bytes() == before
    getattr(Bench(image, runtime), verb)()
    assert Bench(image, runtime).opens(NEW)
