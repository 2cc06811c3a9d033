# SPDX-License-Identifier: GPL-2.0-or-later
"""Changes as the D-Bus calls that start them, and the results of their jobs (org.luksrotd1(5))."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from dbus_next.signature import Variant

from luksrotd.ctl import model
from luksrotd.ctl.connection import error_of
from luksrotd.ctl.differences import new_generation
from luksrotd.errors import InvalidRequest, Outcome
from luksrotd.rotation.edits import Pbkdf

_MEMBERS: Final = {
    "enroll": "Enroll",
    "rotate": "Rotate",
    "stage": "Stage",
    "finish": "Finish",
    "abort": "Abort",
    "remove": "Remove",
    "set-data": "SetData",
    "adopt": "Adopt",
    "release": "Release",
    "recreate": "Recreate",
}


@dataclass(slots=True)
class Call:
    """A method call: arguments, and the descriptors that they name by index."""

    member: str
    signature: str = ""
    body: list[Any] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)

    def add(self, signature: str, value: Any) -> None:
        """One more argument."""
        self.signature += signature
        self.body.append(value)

    def add_secret(self, secret: model.Credential | model.Delivery | None) -> None:
        """One more argument: a descriptor, a token, a key to be generated, or (None) no secret."""
        described = {}
        if isinstance(secret, int):
            described["fd"] = self._fd(secret)
        elif isinstance(secret, model.Token):
            described["token"] = Variant("i", -1 if secret.number is None else secret.number)
            if secret.pin is not None:
                described["pin-fd"] = self._fd(secret.pin)
        elif secret is not None:
            described["generate"] = Variant("b", True)
        self.add("a{sv}", described)

    def _fd(self, fd: int) -> Variant:
        self.fds.append(fd)
        return Variant("h", len(self.fds) - 1)


def change(request: model.KeyRequest, group: str = "") -> Call:
    """The call on a device; ``group``: id of the set whose other volumes are left alone."""
    call, verb, options = Call(_MEMBERS[request.verb]), request.verb, _options(request)
    if verb == "adopt":
        call.add("u", request.keyslot)
    call.add("s", request.name)
    if verb == "set-data":
        call.add("s", json.dumps(request.data or {}))
        options.pop("data", None)
    if verb in ("enroll", "rotate", "stage", "remove", "adopt", "recreate"):
        call.add_secret(request.credential)
    if verb in ("enroll", "rotate", "stage", "recreate"):
        call.add_secret(request.new)
    if group:
        options["group"] = Variant("s", group)
    call.add("a{sv}", options)
    return call


def change_set(paths: Sequence[str], request: model.KeyRequest) -> Call:
    """The call on the manager."""
    call, options = Call(_MEMBERS[request.verb]), _options(request)
    call.add("ao", list(paths))
    call.add("s", request.name)
    if request.verb == "stage":
        call.add_secret(request.credential)
        call.add_secret(request.new)
        if request.keep:
            options["keep"] = Variant("b", True)
    if request.set is not None:
        options["group"] = Variant("s", request.set)
    call.add("a{sv}", options)
    return call


def volume(found: Mapping[str, Any], data: Mapping[str, Mapping[str, Any] | None]) -> model.Volume:
    """A volume by its properties; ``data``: the associated data of its keys, by name."""
    return model.Volume(
        device=found["Node"],
        uuid=found["UUID"],
        label=found["Label"],
        seqid=found["Generation"],
        keys=keys(found, data),
        keyslots=found["Keyslots"],
        ordinary_keyslots=found["OrdinaryKeyslots"],
        tokens=dict(found["Tokens"]),
        problems=findings(found["Problems"]),
        busy=found["Busy"],
    )


def keys(found: Mapping[str, Any], data: Mapping[str, Mapping[str, Any] | None]) -> list[model.Key]:
    """The managed keys among the properties of a volume."""
    return [
        model.Key(
            token=key["token"],
            name=key["name"],
            generation=key["generation"],
            state=key["state"],
            keyslot=_keyslot(key),
            rotated_at=key["rotated-at"],
            wipe_pending=key["wipe-pending"],
            changed=key["changed"],
            data=data.get(key["name"]),
            expires_at=key["expires-at"],
            set=key["group"],
            set_size=key["group-size"],
        )
        for key in map(values, found["Keys"])
    ]


def findings(found: Sequence[Sequence[str]]) -> Sequence[model.Finding]:
    """What reconcile has found."""
    return [model.Finding(code, action, message) for code, action, message in found]


def verify(name: str, credential: model.Credential) -> Call:
    """The call on a device."""
    call = Call("VerifyKey", "s", [name])
    call.add_secret(credential)
    call.add("a{sv}", {})
    return call


def scrub(if_generation: int | None) -> Call:
    """The call on a device."""
    call = Call("Scrub")
    call.add("a{sv}", _options(model.KeyRequest("scrub", "", if_generation=if_generation)))
    return call


def difference(one: Sequence[Any]) -> model.Difference:
    """What becomes of one object of a volume."""
    what, name, how, before, after = one
    return model.Difference(what, name, how, values(before), values(after))


def planned(body: Sequence[Any], name: str) -> model.Planned:
    """The generation that key ``name`` would have."""
    seqid, differences = body
    return model.Planned(seqid, new_generation(map(difference, differences), name))


def key_change(result: Mapping[str, Any]) -> model.KeyChange:
    """What became of a key."""
    seqids = (result["seqid-before"], result["seqid-after"])
    return model.KeyChange(result["name"], result["generation"], _keyslot(result), *seqids)


def set_change(paths: Sequence[str], result: Mapping[str, Any]) -> model.SetChange:
    """What became of a set, its volumes in the order of ``paths``."""
    members = {one["device"]: one for one in map(values, result["members"])}
    return model.SetChange(
        result["name"],
        result["group"],
        result["group-size"],
        result["state"] or None,
        [_member_change(result["name"], members[path]) for path in paths],
    )


def set_status(
    name: str, paths: Sequence[str], status: Mapping[str, Any], members: Sequence[Mapping[str, Any]]
) -> model.SetStatus:
    """Where a set is, its volumes in the order of ``paths``."""
    found = {one["device"]: one for one in members}
    return model.SetStatus(
        name,
        status["group"] or None,
        status["group-size"] if status["group"] else None,
        status["state"],
        sorted(status["steps"]),
        status["why"],
        [_set_member(found[path]) for path in paths],
    )


def values(variants: Mapping[str, Variant]) -> dict[str, Any]:
    """A dictionary as it came, without its variants."""
    return {name: variant.value for name, variant in variants.items()}


def _member_change(name: str, member: Mapping[str, Any]) -> model.MemberChange:
    error = None
    if member["error"]:
        told = error_of(member["error"], member["message"])
        error = type(told)(told.message, outcome=Outcome(member["outcome"]))
    changed = key_change({"name": name, **member}) if "seqid-after" in member else None
    return model.MemberChange(member["happened"], changed, error)


def _set_member(member: Mapping[str, Any]) -> model.SetMember:
    return model.SetMember(member["uuid"], member["standing"], member["generation"], _keyslot(member), member["why"])


def _keyslot(described: Mapping[str, Any]) -> int | None:
    return None if described["keyslot"] < 0 else int(described["keyslot"])


def _options(request: model.KeyRequest) -> dict[str, Variant]:
    """Raises ``InvalidRequest`` for a number that no daemon could take."""
    try:
        return _described(request)
    except ValueError as error:
        raise InvalidRequest(f"cannot ask luksrotd: {error}") from error


def _described(request: model.KeyRequest) -> dict[str, Variant]:
    options = {}
    if request.data is not None:
        options["data"] = Variant("s", json.dumps(request.data))
    if request.volume_key:
        options["volume-key"] = Variant("b", True)
    if request.expires is not None:
        options["expires"] = Variant("t", request.expires)
    if request.if_generation is not None:
        options["if-generation"] = Variant("t", request.if_generation)
    if request.generation is not None:
        options["key-generation"] = Variant("u", request.generation)
    return options | (_cost(request.pbkdf) if request.pbkdf is not None else {})


def _cost(pbkdf: Pbkdf) -> dict[str, Variant]:
    numbers = {
        "pbkdf-force-iterations": pbkdf.iterations,
        "pbkdf-memory": pbkdf.memory_kib,
        "pbkdf-parallel": pbkdf.parallel,
    }
    given = {name: Variant("u", number) for name, number in numbers.items() if number is not None}
    return {"pbkdf": Variant("s", pbkdf.type), **given}
