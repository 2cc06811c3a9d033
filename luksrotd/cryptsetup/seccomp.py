# SPDX-License-Identifier: GPL-2.0-or-later
"""A filter of system calls for this process, by libseccomp; here, because cffi is confined to this package."""

import errno
import os
from collections.abc import Iterable
from typing import Final

from luksrotd.cryptsetup._ffi import ffi, lib
from luksrotd.records import dataclass

#: Here mmap(2) has its arguments in memory, where no filter sees them; on s390 clone(2) has its flags elsewhere, too.
_UNLIKE_OTHERS: Final = (lib.SCMP_ARCH_S390, lib.SCMP_ARCH_S390X, lib.SCMP_ARCH_X86)


@dataclass(frozen=True, slots=True)
class Condition:
    """Of the argument with that number (from 0), the bits of ``mask`` are ``value``."""

    argument: int
    mask: int
    value: int = 0


@dataclass(frozen=True, slots=True)
class Rule:
    """One way in which a system call may be made; of several for one call, any will do."""

    call: str
    conditions: tuple[Condition, ...] = ()


def allow_only(rules: Iterable[Rule]) -> None:
    """From now on every system call that no rule allows fails with ENOSYS; there is no way back.

    So it seems to programs that the kernel is an old one, and the C library falls back on calls that it knows.  A rule
    for a call that libseccomp does not know is left out.  Calls of another ABI (32 bit, x32), by which the rules could
    be evaded, kill the thread.  Threads that run already keep what they may.  Raises ``OSError``.
    """
    if lib.seccomp_arch_native() in _UNLIKE_OTHERS:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    context = lib.seccomp_init(lib.LUKSROTD_ACT_ENOSYS)
    if not context:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    try:
        # The kernel's errno, not ECANCELED for all of them.
        _check("seccomp_attr_set", lib.seccomp_attr_set(context, lib.SCMP_FLTATR_API_SYSRAWRC, 1))
        for rule in rules:
            _add(context, rule)
        _check("seccomp_load", lib.seccomp_load(context))
    finally:
        lib.seccomp_release(context)


def _add(context: object, rule: Rule) -> None:
    number = lib.seccomp_syscall_resolve_name(rule.call.encode())
    if number == lib.__NR_SCMP_ERROR:
        return
    conditions = ffi.new("struct scmp_arg_cmp[]", len(rule.conditions))
    for target, condition in zip(conditions, rule.conditions, strict=True):
        target.arg, target.op = condition.argument, lib.SCMP_CMP_MASKED_EQ
        target.datum_a, target.datum_b = condition.mask, condition.value
    # Calls that this architecture does not have are left out, too: libseccomp sees to it.
    added = lib.seccomp_rule_add_array(context, lib.SCMP_ACT_ALLOW, number, len(rule.conditions), conditions)
    _check(f"seccomp_rule_add for {rule.call}", added)


def _check(call: str, result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result), call)
