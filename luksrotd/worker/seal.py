# SPDX-License-Identifier: GPL-2.0-or-later
"""What a worker may ask of the kernel once it has its descriptors, and before it reads a secret or a header.

Two walls beside the one of its user (``worker.confine``): which files it may open, by Landlock where the kernel has it,
and which system calls it may make.  docs/adr/0022-worker-sandbox.md says why it is these.
"""

import mmap
import os
import socket
import termios
from collections.abc import Iterator
from typing import Final

from luksrotd import names
from luksrotd.cryptsetup import landlock, linux, seccomp
from luksrotd.cryptsetup.landlock import Access
from luksrotd.cryptsetup.seccomp import Condition, Rule
from luksrotd.errors import EngineError

#: Whole arguments of the kernel's types int and unsigned int; the rest of their registers means nothing.
_INT: Final = 0xFFFF_FFFF
_POINTER: Final = 0xFFFF_FFFF_FFFF_FFFF

#: The libraries that libcryptsetup and token plugins load later, their configuration, and what the kernel tells.
READABLE: Final = ("/etc", "/lib", "/lib32", "/lib64", "/proc", "/sys", "/usr", "/dev/random", "/dev/urandom")
#: For a token of systemd's: signatures of PCR values, and the policy of systemd-pcrlock, if it was enrolled with one.
READABLE_FOR_TOKENS: Final = ("/run/systemd", "/var/lib/systemd")

#: Allowed with any arguments.
CALLS: Final = (
    # memory; not mmap and mprotect, see below
    *("brk", "madvise", "mlock", "mlock2", "mremap", "munlock", "munmap"),
    # descriptors that are there, or come of an open
    *("close", "fadvise64", "fadvise64_64", "arm_fadvise64_64", "fcntl", "fcntl64", "fdatasync", "flock", "fsync"),
    *("_llseek", "lseek", "read", "readv", "pread64", "preadv", "preadv2"),
    *("write", "writev", "pwrite64", "pwritev", "pwritev2"),
    *("poll", "ppoll", "ppoll_time64", "pselect6", "pselect6_time64", "select", "_newselect"),
    # looking at files
    *("access", "faccessat", "faccessat2", "fstat", "fstat64", "fstatat64", "newfstatat", "lstat", "lstat64"),
    *("stat", "stat64", "statx", "fstatfs", "fstatfs64", "statfs", "statfs64"),
    *("getcwd", "getdents", "getdents64", "readlink", "readlinkat"),
    # the control socket, and the kernel's ciphers (AF_ALG), for keyslots that OpenSSL has none for
    *("accept", "accept4", "bind", "recv", "recvfrom", "recvmsg", "send", "sendmsg"),
    # threads, signals and the end
    *("futex", "futex_time64", "get_robust_list", "set_robust_list", "rseq", "gettid", "sched_yield"),
    *("sched_getaffinity", "getcpu", "exit", "exit_group", "restart_syscall"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "sigreturn"),
    # time
    *("clock_getres", "clock_getres_time64", "clock_gettime", "clock_gettime64", "gettimeofday", "time", "times"),
    *("clock_nanosleep", "clock_nanosleep_time64", "nanosleep"),
    # questions about this process and the machine
    *("capget", "getegid", "getegid32", "geteuid", "geteuid32", "getgid", "getgid32", "getuid", "getuid32"),
    *("getpid", "getppid", "getpgrp", "getrandom", "getrlimit", "ugetrlimit", "getrusage", "sysinfo", "uname"),
)

_CLONE_THREAD: Final = 0x0001_0000
#: CLONE_NEWCGROUP, -UTS, -IPC, -USER, -PID, -NET, -NS and -TIME.
_CLONE_NAMESPACES: Final = 0x7E02_0080
#: Of the flags of open(2), those that would make a file; O_TMPFILE is O_DIRECTORY and a bit of its own.
_CREATING: Final = os.O_CREAT | (os.O_TMPFILE & ~os.O_DIRECTORY)
#: Options of prctl(2) that libcap-ng, with which systemd's token plugin comes, asks about when it is loaded:
#: PR_CAPBSET_READ, PR_GET_SECUREBITS, PR_GET_NO_NEW_PRIVS.
_PRCTL_QUESTIONS: Final = (23, 27, 39)
_KEYCTL_READ: Final = 11
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_IS_SET = 47, 1


def seal(*, tokens: bool) -> None:
    """Forbid all but what the operations need; with ``tokens``, what plugins do, too.  Raises ``EngineError``.

    Without Landlock (Linux before 5.13, or switched off) what the user of this process may open stays open to it.
    """
    try:
        landlock.allow_only(dict(files(tokens=tokens)))
        seccomp.allow_only(rules(os.getpid(), tokens=tokens))
    except OSError as error:
        raise EngineError(f"cannot confine the worker: {linux.reason(error)}") from error


def files(*, tokens: bool) -> Iterator[tuple[str, Access]]:
    """What may be opened by its path, and how."""
    for path in (*READABLE, *(READABLE_FOR_TOKENS if tokens else ())):
        yield path, Access.READ_FILE | Access.READ_DIR
    if tokens:
        yield names.TPM_DEVICE, Access.READ_FILE | Access.WRITE_FILE


def rules(process: int, *, tokens: bool) -> Iterator[Rule]:
    """The system calls of the worker with that process id."""
    if tokens:
        # Those of the type luks2-keyring name a key of the caller's keyrings.
        yield Rule("request_key", (Condition(2, _POINTER), Condition(3, _INT)))
        yield Rule("keyctl", (Condition(0, _INT, _KEYCTL_READ),))
    yield from map(Rule, CALLS)
    # No file is made.  Not openat2: its flags are in memory.
    yield Rule("open", (Condition(1, _CREATING),))
    yield Rule("openat", (Condition(2, _CREATING),))
    # Memory is never writable and executable, nor becomes executable: libraries are mapped so from the beginning.
    for call in ("mmap", "mmap2"):
        yield Rule(call, (Condition(2, mmap.PROT_EXEC),))
        yield Rule(call, (Condition(2, mmap.PROT_WRITE),))
    yield Rule("mprotect", (Condition(2, mmap.PROT_EXEC),))
    # Threads, but no processes.  Not clone3: its flags are in memory, and the C library can do without.
    yield Rule("clone", (Condition(0, _CLONE_THREAD | _CLONE_NAMESPACES, _CLONE_THREAD),))
    # What abort(3) and pthread_cancel(3) come to.
    yield Rule("tgkill", (Condition(0, _INT, process),))
    yield Rule("socket", (Condition(0, _INT, socket.AF_ALG),))
    yield Rule("setsockopt", (Condition(1, _INT, socket.SOL_ALG),))
    # On the control socket, which is connected; to no address.
    yield Rule("sendto", (Condition(4, _POINTER),))
    # Whether it is a terminal: the C library asks that about stderr.
    yield Rule("ioctl", (Condition(1, _INT, termios.TCGETS),))
    yield Rule("prlimit64", (Condition(0, _INT), Condition(2, _POINTER)))
    for option in _PRCTL_QUESTIONS:
        yield Rule("prctl", (Condition(0, _INT, option),))
    yield Rule("prctl", (Condition(0, _INT, _PR_CAP_AMBIENT), Condition(1, _INT, _PR_CAP_AMBIENT_IS_SET)))
