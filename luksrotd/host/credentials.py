# SPDX-License-Identifier: GPL-2.0-or-later
"""The systemd credentials of this service (systemd.exec(5), ``LoadCredential=``): opened here, read by the worker."""

import os
import stat
from typing import Final, Self

from luksrotd.errors import InvalidRequest, SecretRejected
from luksrotd.records import dataclass

NAME_MAX: Final = 255
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


@dataclass(frozen=True, slots=True)
class ServiceCredentials:
    """Those in ``directory``; None if the service manager has given none."""

    directory: str | None

    @classmethod
    def of_environment(cls) -> Self:
        """Those of this process."""
        return cls(os.environ.get("CREDENTIALS_DIRECTORY") or None)

    def open(self, name: str) -> int:
        """A descriptor of the credential of that name; blocks.

        Raises ``InvalidRequest`` for what cannot be the name of one, and ``SecretRejected`` if there is none.  A name
        is not repeated: it may be a secret in the wrong place.
        """
        if not is_name(name):
            raise InvalidRequest("cannot use the credential: that is no name of one")
        if self.directory is None:
            raise SecretRejected(
                "cannot open the credential: the service has none, see LoadCredential= in systemd.exec(5)"
            )
        try:
            directory = os.open(self.directory, _DIRECTORY_FLAGS)
            try:
                fd = os.open(name, _FILE_FLAGS, dir_fd=directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise SecretRejected(f"cannot open the credential: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise SecretRejected("cannot use the credential: it is not a regular file")
        return fd


def is_name(name: str) -> bool:
    """Whether a credential may be called that, as systemd has it: one path component of printable ASCII, no ``:``."""
    if not 0 < len(name) <= NAME_MAX or not name.strip("."):
        return False
    return all(" " <= letter <= "~" and letter not in "/:" for letter in name)
