# SPDX-License-Identifier: GPL-2.0-or-later
"""Dataclasses made quickly are as those of the standard library, which is asked about each thing."""

import copy
import dataclasses
import importlib
import pickle
import pkgutil
from typing import Any

import pytest

import luksrotd
from luksrotd.records import dataclass

WAYS = {"stdlib": dataclasses.dataclass, "ours": dataclass}


def classes(way):
    made = WAYS[way](frozen=True, slots=True)

    @made
    class Empty:
        """None."""

    @made
    class Point:
        """Three ways to have a value."""

        x: int
        y: int = 2
        more: list[int] = dataclasses.field(default_factory=list)

        def __post_init__(self):
            if self.x < 0:
                raise ValueError("left of it")

        @property
        def both(self):
            return self.x, self.y

    @made
    class Deeper(Point):
        """With the fields of another."""

        z: Any = None

    @made
    class Loud:
        """Says itself what it is."""

        name: str

        def __repr__(self):
            return self.name.upper()

        def __eq__(self, other):
            return self.name.lower() == other.name.lower()

        def __hash__(self):
            return 7

    return Empty, Point, Deeper, Loud


def told(call):
    """What comes of it."""
    try:
        return "returned", call()
    except Exception as error:  # noqa: BLE001 - all are compared
        return type(error), str(error).replace("classes.<locals>.", "")


def answers(way):
    empty, point, deeper, loud = classes(way)
    one = point(1)
    yield repr(empty()), empty() == empty(), hash(empty()) == hash(empty())
    yield repr(one), one.both, one.more, point.__match_args__, deeper.__match_args__
    yield repr(deeper(1, 3, [4], "z")), deeper(1) == deeper(1), deeper(1) == point(1), deeper(1).both
    yield one == point(1), one == point(2), one != point(1, 3), one == (1, 2, []), one == point(1, more=[1])
    yield point(1).more is point(1).more, point(1, more=None).more
    yield hash(point(1, 2, ())) == hash(point(1, 2, ())), len({point(1, 2, ()), point(1, 2, ()), point(2, 2, ())})
    yield told(lambda: hash(one))
    yield told(lambda: setattr(one, "x", 2)), told(lambda: delattr(one, "x"))
    yield told(point), told(lambda: point(-1)), told(lambda: point(1, 2, [], 4)), told(lambda: point(q=1))
    yield told(lambda: one.__dict__), told(lambda: deeper(1).__dict__)
    yield dataclasses.asdict(one), dataclasses.astuple(one), dataclasses.is_dataclass(point)
    yield (
        repr(dataclasses.replace(one, y=5)),
        told(lambda: dataclasses.replace(one, x=-5)),
        dataclasses.replace(one) == one,
    )
    yield copy.copy(one) == one, copy.copy(one).more is one.more
    yield copy.deepcopy(one) == one, copy.deepcopy(one).more is one.more
    yield repr(loud("a")), loud("a") == loud("A"), hash(loud("a")), told(lambda: setattr(loud("a"), "name", "b"))
    match point(8, 9):
        case point(8, y=y):
            yield y


@pytest.mark.parametrize(("ours", "stdlib"), list(zip(answers("ours"), answers("stdlib"), strict=True)))
def test_they_answer_alike(ours, stdlib):
    assert ours == stdlib


@dataclass(frozen=True, slots=True)
class Pickled:
    """Is found again by its name."""

    one: int


def test_they_can_be_pickled():
    assert pickle.loads(pickle.dumps(Pickled(1))) == Pickled(1)


def test_other_kinds_are_the_standard_librarys():
    @dataclass(slots=True)
    class Changeable:
        """Not frozen."""

        one: int

    changed = Changeable(1)
    changed.one = 2
    assert changed == Changeable(2)


def test_none_of_ours_asks_for_more_than_that():
    """Keyword-only fields, fields that are not compared, and the like would be taken for plain ones."""
    for module in pkgutil.walk_packages(luksrotd.__path__, "luksrotd."):
        if not module.name.endswith("__main__") and not module.name.startswith("luksrotd.cryptsetup.ffi_build"):
            importlib.import_module(module.name)
    plain = [kind for kind in object.__subclasses__() if hasattr(kind, "__record_values__")]
    assert len(plain) > 100
    for kind in plain:
        for field in dataclasses.fields(kind):
            assert (field.init, field.repr, field.compare, field.hash, field.kw_only) == (True, True, True, None, False)
