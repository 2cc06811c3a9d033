# SPDX-License-Identifier: GPL-2.0-or-later
"""What a worker is given for each of its secrets: descriptors, and the groups of the devices that a token needs."""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from luksrotd import names
from luksrotd.ports import GenerateInto, SecretFd, SecretSource, TokenSource

#: The only device that a token can be about here; the kernel's resource manager, so that users do not disturb another.
TPM_DEVICE: Final = names.TPM_DEVICE
_READ_AND_WRITE: Final = stat.S_IRGRP | stat.S_IWGRP


def fds_of(source: SecretSource) -> tuple[int, ...]:
    """The descriptors that it comes by."""
    if isinstance(source, TokenSource):
        return () if source.pin is None else (source.pin.fd,)
    return (source.fd,)


def declared(secrets: Mapping[str, SecretSource], places: Sequence[int]) -> dict[str, Any]:
    """The secrets as ``rotation.wire`` declares them; ``places``: where their descriptors are, in their order."""
    rest = iter(places)
    return {name: _declared(source, rest) for name, source in secrets.items()}


def _declared(source: SecretSource, places: Iterator[int]) -> dict[str, Any]:
    match source:
        case SecretFd(limit=limit):
            return {"fd": next(places), "limit": limit}
        case GenerateInto():
            return {"generate": next(places)}
        case TokenSource(token, pin):
            return {"token": token, "pin": None if pin is None else _declared(pin, places)}


def groups_for(secrets: Iterable[SecretSource], device: str) -> tuple[int, ...]:
    """The supplementary groups of a worker: if a token may be asked, the one that may use the TPM, should there be one.

    The header says which token needs a TPM, and nobody has read that yet; nor would it keep a hostile header out.
    """
    if not any(isinstance(source, TokenSource) for source in secrets):
        return ()
    try:
        status = os.stat(device)  # noqa: PTH116 - the module has no use for a Path
    except OSError:
        return ()
    shared = status.st_gid != 0 and status.st_mode & _READ_AND_WRITE == _READ_AND_WRITE
    return (status.st_gid,) if stat.S_ISCHR(status.st_mode) and shared else ()
