# SPDX-License-Identifier: GPL-2.0-or-later
"""Other changes of managed keys: remove, other data, adopt and release, make anew."""

import argparse
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from luksrotd.ctl import secrets
from luksrotd.ctl.arguments import (
    Verbs,
    add_credential,
    add_device,
    add_engine,
    add_name,
    add_new_secret,
    check_engine,
    check_new_secret,
)
from luksrotd.ctl.offline.base import call
from luksrotd.ctl.report import Report, changed
from luksrotd.ctl.request import data, device, key_request
from luksrotd.errors import InvalidRequest
from luksrotd.names import ATOMIC
from luksrotd.rotation.edits import UNLOCK, VOLUME_KEY, Pbkdf

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from luksrotd.ctl.local import Local
    from luksrotd.ctl.model import Progress
    from luksrotd.ports import DeviceRef, SecretSource

    Use = Callable[[Local, DeviceRef, Progress], Awaitable[object]]


def add(verbs: Verbs) -> None:
    """The verbs."""
    verbs.group("managed keys, what else there is to do (--direct only)")
    remove = verbs.add(
        "remove",
        _remove,
        "remove a managed key, keyslot and token; another key must be shown",
        "luksrotctl --direct remove /dev/sda2 --key-file passphrase.key",
        check=check_engine,
    )
    set_data = verbs.add(
        "set-data",
        _set_data,
        "give a managed key other associated data",
        "luksrotctl --direct set-data /dev/sda2 --data @escrow.json",
        check=check_engine,
    )
    adopt = verbs.add(
        "adopt",
        _adopt,
        "manage a keyslot that is there already, a recovery key say",
        "luksrotctl --direct adopt /dev/sda2 --keyslot 1 --key-file recovery.key --data @escrow.json",
    )
    release = verbs.add(
        "release",
        _release,
        "manage a key no more; its keyslot stays, with the token that it had before",
        "luksrotctl --direct release /dev/sda2",
    )
    recreate = verbs.add(
        "recreate",
        _recreate,
        "make a managed key anew from what is left of it",
        "luksrotctl --direct recreate /dev/sda2 --key-file backup.key --data @escrow.json",
        check=_check_recreate,
    )
    for verb in (remove, set_data, adopt, release, recreate):
        add_device(verb)
        add_name(verb)
    add_credential(remove, "another key of the volume, one that stays")
    for verb in (remove, set_data):
        add_engine(verb)
    set_data.add_argument("--data", metavar="JSON|@FILE", required=True, help="the associated data, a JSON object")
    adopt.add_argument("--keyslot", type=int, metavar="N", required=True, help="the keyslot")
    adopt.add_argument("--data", metavar="JSON|@FILE", help="the associated data, a JSON object; empty without it")
    check = "the key of that keyslot: tried before anything is written; without it, it is not tried"
    adopt.add_argument("--key-file", "-d", metavar="FILE", help=check)
    _add_recreate(recreate)


def _add_recreate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make a managed key anew from what is left of it.\n\n"
        "Its token is lost, or does not fit its keyslot any more: give the key itself with --key-file, and the token\n"
        "is made for the keyslot that it opens.  Its keyslot is lost: give a new key, and any other key of the volume\n"
        "with --key-file, or the volume key.\n\nWorks with --direct only, so far."
    )
    add_credential(parser, "the key itself; with a new key: any key of the volume")
    parser.add_argument("--volume-key-file", metavar="FILE", help="in place of --key-file: the volume key")
    add_new_secret(parser, "--key-file is the key itself")


def _check_recreate(options: argparse.Namespace) -> None:
    check_new_secret(options)
    costs = (options.pbkdf, options.pbkdf_memory, options.pbkdf_parallel, options.pbkdf_force_iterations)
    if costs != (None, None, None, None) and not _makes_new(options):
        raise InvalidRequest("cannot use --pbkdf without a new key: give --new-keyfile or --generate")
    if options.volume_key_file is None:
        return
    if options.key_file is not None:
        raise InvalidRequest("cannot use --key-file and --volume-key-file together")
    if not _makes_new(options):
        raise InvalidRequest("cannot use --volume-key-file without a new key: give --new-keyfile or --generate")
    if options.volume_key_file == secrets.STDIN == options.new_keyfile:
        raise InvalidRequest("cannot read two keys from standard input: give a file for one of them")


def _makes_new(options: argparse.Namespace) -> bool:
    return bool(options.generate) or options.new_keyfile is not None


def _remove(options: argparse.Namespace) -> Report:
    with secrets.opened(options.key_file, f"Another key of {options.device}") as credential:
        return _change(
            options,
            "remove",
            lambda local, ref, progress: local.volumes.remove(
                ref, _source(UNLOCK, credential), name=options.name, progress=progress
            ),
        )


def _set_data(options: argparse.Namespace) -> Report:
    wanted = data(options.data) or {}
    return _change(options, "set-data", lambda local, ref, _: local.volumes.set_data(ref, wanted, name=options.name))


def _adopt(options: argparse.Namespace) -> Report:
    wanted = data(options.data) or {}
    with ExitStack() as stack:
        proof: Mapping[str, SecretSource] = {}
        if options.key_file is not None:
            prompt = f"Key of keyslot {options.keyslot} of {options.device}"
            proof = _source(UNLOCK, stack.enter_context(secrets.opened(options.key_file, prompt)))
        return _change(
            options,
            "adopt",
            lambda local, ref, progress: local.volumes.adopt(
                ref, options.keyslot, proof, data=wanted, name=options.name, progress=progress
            ),
        )


def _release(options: argparse.Namespace) -> Report:
    return _change(options, "release", lambda local, ref, _: local.volumes.release(ref, name=options.name))


def _recreate(options: argparse.Namespace) -> Report:
    if _makes_new(options):
        return _recreate_pair(options)
    wanted = data(options.data)
    with secrets.opened(options.key_file, f"Key {options.name} of {options.device}") as credential:
        return _change(
            options,
            "recreate",
            lambda local, ref, progress: local.volumes.recreate(
                ref, _source(UNLOCK, credential), data=wanted, pbkdf=Pbkdf(), name=options.name, progress=progress
            ),
        )


def _recreate_pair(options: argparse.Namespace) -> Report:
    by_volume_key = options.volume_key_file is not None
    with key_request(options, options.volume_key_file) as request:

        async def use(local: "Local", ref: "DeviceRef", progress: "Progress") -> object:
            async with local.prepared(request, VOLUME_KEY if by_volume_key else UNLOCK) as (sources, pbkdf, deliver):
                return await local.volumes.recreate(
                    ref,
                    sources,
                    data=request.data,
                    pbkdf=pbkdf,
                    name=request.name,
                    progress=progress,
                    deliver=deliver,
                )

        return _change(options, "recreate", use)


def _change(options: argparse.Namespace, verb: str, use: "Use") -> Report:
    from luksrotd.ctl.local import changed_key, ref_of  # noqa: PLC0415 - not before --direct is known to be meant

    async def work(local: "Local", progress: "Progress") -> Any:
        return changed_key(await use(local, ref_of(device(options)), progress))

    done = call(work, getattr(options, "engine", ATOMIC))
    output = getattr(options, "output", None)
    return changed(verb, options.device, done, output, to_stderr=getattr(options, "generate", False) and output is None)


def _source(name: str, fd: int) -> "Mapping[str, SecretSource]":
    from luksrotd.ports import SecretFd  # noqa: PLC0415 - it imports what the bus does not need

    return {name: SecretFd(fd)}
