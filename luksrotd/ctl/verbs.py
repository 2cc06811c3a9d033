# SPDX-License-Identifier: GPL-2.0-or-later
"""The verbs: options → calls of the backend → a report."""

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from luksrotd.ctl import secrets
from luksrotd.ctl.delivery import ToFile, ToStdout
from luksrotd.ctl.exits import Exit, status_of, worst
from luksrotd.ctl.interrupt import interruptible
from luksrotd.ctl.model import Backend, Device, KeyRequest, Reconciled
from luksrotd.ctl.progress import shown
from luksrotd.ctl.report import Failed, Report, changed, listed, reconciled, showed, verified
from luksrotd.errors import Cancelled, InvalidRequest, LuksrotdError
from luksrotd.rotation.edits import Pbkdf

#: Bytes; associated data has to fit into the 12 KiB or so of a token's metadata area.
DATA_LIMIT: Final = 1024 * 1024

T = TypeVar("T")
Operation = Callable[[Backend], Coroutine[Any, Any, T]]


def run(options: argparse.Namespace) -> Report:
    """Do what the command line says; raises ``LuksrotdError``."""
    verbs: Mapping[str, Callable[[argparse.Namespace], Report]] = {
        "list": _list,
        "show": _show,
        "enroll": _change_key,
        "rotate": _change_key,
        "verify": _verify,
        "reconcile": _reconcile,
    }
    return verbs[options.verb](options)


def _list(options: argparse.Namespace) -> Report:
    async def work(backend: Backend) -> Report:
        devices = await backend.devices()
        return listed([(device.name, await _tried(backend.volume(device, data=False))) for device in devices])

    return _call(options, work)


def _show(options: argparse.Namespace) -> Report:
    async def work(backend: Backend) -> Report:
        return showed(await backend.volume(_device(options), data=True))

    return _call(options, work)


def _verify(options: argparse.Namespace) -> Report:
    with secrets.opened(options.key_file, f"Key {options.name} of {options.device}") as credential:

        async def work(backend: Backend) -> Report:
            matches = await backend.verify(_device(options), options.name, credential)
            return verified(options.device, options.name, matches=matches)

        return _call(options, work)


def _change_key(options: argparse.Namespace) -> Report:
    with _request(options) as request:

        async def work(backend: Backend) -> Report:
            change = backend.enroll if options.verb == "enroll" else backend.rotate
            with shown() as progress:
                done = await change(_device(options), request, progress)
            return changed(options.verb, options.device, done, options.output, to_stderr=_prints_key(options))

        return _call(options, work)


def _reconcile(options: argparse.Namespace) -> Report:
    async def work(backend: Backend) -> Report:
        devices = await backend.devices() if options.all else [Device(name, options.header) for name in options.devices]
        results = []
        for device in devices:
            result = await _tried(backend.reconcile(device, dry_run=options.dry_run))
            if isinstance(result, Failed) and (len(options.devices) == 1 or isinstance(result.error, Cancelled)):
                raise result.error
            results.append((device.name, result))
        return reconciled(results, worst(_status(result) for _, result in results), dry_run=options.dry_run)

    return _call(options, work)


def _status(result: Reconciled | Failed) -> Exit:
    if isinstance(result, Failed):
        return status_of(result.error)
    return Exit.PERSON if any(finding.action == "person" for finding in result.left) else Exit.DONE


async def _tried(call: Awaitable[T]) -> T | Failed:
    """The result, or the error that must not keep the others from their turn."""
    try:
        return await call
    except LuksrotdError as error:
        return Failed(error)


def _call(options: argparse.Namespace, work: Operation[T]) -> T:
    async def call() -> T:
        backend = _backend(direct=options.direct)
        try:
            return await interruptible(work(backend), backend.interrupt)
        finally:
            await backend.close()

    return asyncio.run(call())


def _backend(*, direct: bool) -> Backend:
    # Imported late: a client of the bus needs none of luksrotd's own code, and --direct no D-Bus.
    if direct:
        from luksrotd.ctl.local import Local  # noqa: PLC0415 - see above

        return Local()
    from luksrotd.ctl.remote import Remote  # noqa: PLC0415 - see above

    return Remote()


def _device(options: argparse.Namespace) -> Device:
    return Device(options.device, options.header)


def _prints_key(options: argparse.Namespace) -> bool:
    return bool(options.generate) and options.output is None


@contextmanager
def _request(options: argparse.Namespace) -> Iterator[KeyRequest]:
    data, pbkdf = _data(options.data), _pbkdf(options)
    with ExitStack() as stack:
        credential = stack.enter_context(secrets.opened(options.key_file, f"Any key of {options.device}"))
        new: int | ToFile | ToStdout
        if not options.generate:
            prompt = f"New key {options.name} of {options.device}"
            new = stack.enter_context(secrets.opened(options.new_keyfile, prompt, confirm=True))
        elif options.output is not None:
            new = stack.enter_context(ToFile(options.output))
        else:
            new = ToStdout()
        yield KeyRequest(options.name, credential, new, data, pbkdf)


def _data(option: str | None) -> Mapping[str, Any] | None:
    """The value of --data; raises ``InvalidRequest``."""
    if option is None:
        return None
    from luksrotd.rotation.token import parse_data  # noqa: PLC0415 - only where it is needed: start-up stays fast

    if not option.startswith("@"):
        return parse_data(option)
    path = option.removeprefix("@")
    try:
        with Path(path).open("rb") as file:
            text = file.read(DATA_LIMIT + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise InvalidRequest(f"cannot read the associated data from {path}: {reason}") from error
    if len(text) > DATA_LIMIT:
        raise InvalidRequest(f"cannot use the associated data: it is longer than {DATA_LIMIT} bytes")
    try:
        return parse_data(text.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest("cannot use the associated data: it is not UTF-8") from error


def _pbkdf(options: argparse.Namespace) -> Pbkdf | None:
    """None if the command line says nothing of it; raises ``InvalidRequest``."""
    cost = (options.pbkdf_force_iterations, options.pbkdf_memory, options.pbkdf_parallel)
    if options.pbkdf is None and cost == (None, None, None):
        return None
    iterations, memory, parallel = cost
    return Pbkdf(options.pbkdf or Pbkdf().type, iterations=iterations, memory_kib=memory, parallel=parallel)
