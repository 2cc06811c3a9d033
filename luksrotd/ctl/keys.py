# SPDX-License-Identifier: GPL-2.0-or-later
"""Other changes of managed keys: remove, other data, adopt and release, make anew."""

import argparse
from dataclasses import replace

from luksrotd.ctl import secrets
from luksrotd.ctl.arguments import (
    Verbs,
    add_credential,
    add_device,
    add_engine,
    add_if_generation,
    add_name,
    add_new_secret,
    add_token,
    check_engine,
    check_new_secret,
)
from luksrotd.ctl.backend import change
from luksrotd.ctl.model import KeyRequest
from luksrotd.ctl.report import Report
from luksrotd.ctl.request import check_token, credential, data, key_request
from luksrotd.errors import InvalidRequest


def add(verbs: Verbs) -> None:
    """The verbs."""
    verbs.group("managed keys, what else there is to do")
    remove = verbs.add(
        "remove",
        _remove,
        "remove a managed key, keyslot and token; another key must be shown",
        "luksrotctl remove /dev/sda2 --key-file passphrase.key",
        check=check_engine,
        bus=True,
    )
    set_data = verbs.add(
        "set-data",
        _set_data,
        "give a managed key other associated data",
        "luksrotctl set-data /dev/sda2 --data @escrow.json",
        check=check_engine,
        bus=True,
    )
    adopt = verbs.add(
        "adopt",
        _adopt,
        "manage a keyslot that is there already, a recovery key say",
        "luksrotctl adopt /dev/sda2 --keyslot 1 --key-file recovery.key --data @escrow.json",
        bus=True,
    )
    release = verbs.add(
        "release",
        _release,
        "manage a key no more; its keyslot stays, with the token that it had before",
        "luksrotctl release /dev/sda2",
        bus=True,
    )
    recreate = verbs.add(
        "recreate",
        _recreate,
        "make a managed key anew from what is left of it",
        "luksrotctl recreate /dev/sda2 --key-file backup.key --data @escrow.json",
        check=_check_recreate,
        bus=True,
    )
    for verb in (remove, set_data, adopt, release, recreate):
        add_device(verb)
        add_name(verb)
        add_if_generation(verb)
    add_credential(remove, "another key of the volume, one that stays")
    for verb in (remove, set_data):
        add_engine(verb)
    set_data.add_argument("--data", metavar="JSON|@FILE", required=True, help="the associated data, a JSON object")
    adopt.add_argument("--keyslot", type=int, metavar="N", required=True, help="the keyslot")
    adopt.add_argument("--data", metavar="JSON|@FILE", help="the associated data, a JSON object; empty without it")
    check = "the key of that keyslot: tried before anything is written; without it, it is not tried"
    adopt.add_argument("--key-file", "-d", metavar="FILE", help=check)
    _add_recreate(recreate)
    for verb in (remove, adopt, recreate):
        add_token(verb)


def _add_recreate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make a managed key anew from what is left of it.\n\n"
        "Its token is lost, or does not fit its keyslot any more: give the key itself with --key-file, and the token\n"
        "is made for the keyslot that it opens.  Its keyslot is lost: give a new key, and any other key of the volume\n"
        "with --key-file, or the volume key."
    )
    add_credential(parser, "the key itself; with a new key: any key of the volume")
    parser.add_argument("--volume-key-file", metavar="FILE", help="in place of --key-file: the volume key")
    add_new_secret(parser, "--key-file is the key itself", escrow=False)


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
    with credential(options, f"Another key of {options.device}") as shown:
        return change(options, KeyRequest("remove", options.name, shown))


def _set_data(options: argparse.Namespace) -> Report:
    return change(options, KeyRequest("set-data", options.name, data=data(options.data)))


def _adopt(options: argparse.Namespace) -> Report:
    request = KeyRequest("adopt", options.name, data=data(options.data), keyslot=options.keyslot)
    check_token(options)
    if options.key_file is None and options.token is None:
        return change(options, request)
    with credential(options, f"Key of keyslot {options.keyslot} of {options.device}") as shown:
        return change(options, replace(request, credential=shown))


def _release(options: argparse.Namespace) -> Report:
    return change(options, KeyRequest("release", options.name))


def _recreate(options: argparse.Namespace) -> Report:
    if _makes_new(options):
        with key_request(options, options.volume_key_file) as request:
            return change(options, replace(request, volume_key=options.volume_key_file is not None))
    with credential(options, f"Key {options.name} of {options.device}") as shown:
        return change(options, KeyRequest("recreate", options.name, shown, data=data(options.data)))
