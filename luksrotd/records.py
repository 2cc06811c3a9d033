# SPDX-License-Identifier: GPL-2.0-or-later
"""``dataclass``, made quickly.

``dataclasses.dataclass`` writes and compiles seven functions for each class that is frozen and has slots.  That takes
half a millisecond, and the hundred such classes of a luksrotctl that rotates one key were a quarter of its time.  Here
they share all functions but ``__init__``; to those who use them they are the same (tests/unit/test_records.py).
"""

import dataclasses
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass  # noqa: PLC0414 - for others to import
else:

    def dataclass(**options: bool) -> Callable[[type], type]:
        """``dataclasses.dataclass``; what is asked for is made quickly if it is ``frozen=True, slots=True``."""
        return _made if options == {"frozen": True, "slots": True} else dataclasses.dataclass(**options)


class _Shared:
    """What all of them have, but where the class itself says otherwise."""

    def __repr__(self: Any) -> str:
        named = zip(dataclasses.fields(self), self.__record_values__(self), strict=True)
        return f"{type(self).__qualname__}({', '.join(f'{field.name}={value!r}' for field, value in named)})"

    def __eq__(self: Any, other: Any) -> Any:
        if other.__class__ is self.__class__:
            return self.__record_values__(self) == self.__record_values__(other)
        return NotImplemented

    def __hash__(self: Any) -> int:
        return hash(self.__record_values__(self))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")

    def __getstate__(self: Any) -> list[Any]:
        return list(self.__record_values__(self))

    def __setstate__(self: Any, state: list[Any]) -> None:
        for field, value in zip(dataclasses.fields(self), state, strict=True):
            object.__setattr__(self, field.name, value)


_FUNCTIONS = ("__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__", "__getstate__", "__setstate__")


def _made(cls: type) -> type:
    own = frozenset(cls.__dict__)
    made: Any = dataclasses.dataclass(init=False, repr=False, eq=False, slots=True)(cls)
    fields = dataclasses.fields(made)
    made.__record_values__ = staticmethod(_getter([field.name for field in fields]))
    made.__init__ = _init(made, fields)
    for name in _FUNCTIONS:
        if name not in own:
            setattr(made, name, getattr(_Shared, name))
    return made  # type: ignore[no-any-return] # Any, for it gets what no class has


def _getter(names: list[str]) -> Callable[[Any], Any]:
    """What gives the values of all fields, to be compared and hashed."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda record: tuple(getattr(record, name) for name in names)


def _init(cls: type, fields: Iterable["dataclasses.Field[Any]"]) -> Any:
    """The one function that each class has of its own: it is called most of all."""
    known: dict[str, Any] = {"_set": object.__setattr__, "_absent": dataclasses.MISSING}
    parameters, lines = ["self"], []
    for field in fields:
        name = value = field.name
        if field.default_factory is not dataclasses.MISSING:
            known[f"_new_{name}"] = field.default_factory
            parameters.append(f"{name}=_absent")
            value = f"_new_{name}() if {name} is _absent else {name}"
        elif field.default is not dataclasses.MISSING:
            known[f"_default_{name}"] = field.default
            parameters.append(f"{name}=_default_{name}")
        else:
            parameters.append(name)
        lines.append(f" _set(self, {name!r}, {value})")
    if hasattr(cls, "__post_init__"):
        lines.append(" self.__post_init__()")
    text = f"def __init__({', '.join(parameters)}):\n" + "\n".join(lines or [" pass"])
    exec(text, known)  # noqa: S102 - as dataclasses does it, and of the names of fields alone
    init = known["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    return init
