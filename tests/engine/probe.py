# SPDX-License-Identifier: GPL-2.0-or-later
"""Run as a process: tries what a worker has no business with, and prints what came of each attempt, as JSON.

``probe.py (free | sealed | tokens) FOLDER``: without the seal, with it, and as for a worker that may ask tokens.  The
attempts hurt nobody where they succeed: they are about this process, the files in FOLDER, or things that do not exist.
"""

import ctypes
import errno
import json
import os
import socket
import sys
from pathlib import Path

from luksrotd.cryptsetup._ffi import lib
from luksrotd.worker.confine import confine
from luksrotd.worker.seal import seal

LIBC = ctypes.CDLL(None, use_errno=True)
NOBODY = 2**22 + 1  # no process has such a high number
WRITABLE_AND_EXECUTABLE = 2 | 4
PRIVATE_ANONYMOUS = 0x22
#: Each with arguments that the kernel refuses, or that change nothing.
CALLS = {
    "ptrace": (16, NOBODY, 0, 0),
    "process_vm_readv": (NOBODY, None, 0, None, 0, 0),
    "process_vm_writev": (NOBODY, None, 0, None, 0, 0),
    "pidfd_open": (NOBODY, 0),
    "pidfd_getfd": (-1, 0, 0),
    "kill": (NOBODY, 0),
    "tkill": (NOBODY, 0),
    "tgkill": (NOBODY, NOBODY, 0),
    "execve": (b"/nowhere", None, None),
    "execveat": (-1, b"/nowhere", None, None, 0),
    "clone3": (None, 0),
    "unshare": (0,),
    "setns": (-1, 0),
    "mount": (b"/nowhere", b"/nowhere", b"none", 0, None),
    "umount2": (b"/nowhere", 0),
    "pivot_root": (b"/nowhere", b"/nowhere"),
    "chroot": (b"/nowhere",),
    "fsopen": (b"nothing", 0),
    "open_tree": (-1, b"nowhere", 0),
    "move_mount": (-1, b"nowhere", -1, b"nowhere", 0),
    "keyctl": (0, -4, 0, 0, 0),
    "add_key": (None, None, None, 0, 0),
    "request_key": (None, None, None, 0),
    "perf_event_open": (None, 0, -1, -1, 0),
    "memfd_create": (None, 0),
    "openat2": (-1, b"nowhere", None, 0),
    "open_by_handle_at": (-1, None, 0),
    "name_to_handle_at": (-1, b"nowhere", None, None, 0),
    "creat": (b"/nowhere/file", 0o600),
    "chmod": (b"/nowhere", 0),
    "fchmod": (-1, 0),
    "fchmodat": (-1, b"nowhere", 0, 0),
    "chown": (b"/nowhere", -1, -1),
    "fchown": (-1, -1, -1),
    "rename": (b"/nowhere", b"/nowhere"),
    "renameat2": (-1, b"nowhere", -1, b"nowhere", 0),
    "unlink": (b"/nowhere",),
    "unlinkat": (-1, b"nowhere", 0),
    "link": (b"/nowhere", b"/nowhere"),
    "symlink": (b"x", b"/nowhere/x"),
    "mkdir": (b"/nowhere/x", 0),
    "mknod": (b"/nowhere/x", 0, 0),
    "truncate": (b"/nowhere", 0),
    "ftruncate": (-1, 0),
    "setxattr": (b"/nowhere", b"user.x", b"", 0, 0),
    "utimensat": (-1, b"nowhere", None, 0),
    "connect": (-1, None, 0),
    "listen": (-1, 0),
    "socketpair": (0, 0, 0, None),
    "setuid": (os.getuid(),),
    "setgroups": (0, None),
    "capset": (None, None),
    "setpriority": (0, NOBODY, 0),
    "sched_setaffinity": (NOBODY, 0, None),
    "personality": (0xFFFFFFFF,),
    "seccomp": (0, 1, None),
    "shmget": (0, 0, 0),
    "inotify_init1": (-1,),
    "fanotify_init": (0, 0),
    "quotactl": (0, b"/nowhere", 0, None),
    "reboot": (0, 0, 0, None),
    "swapon": (b"/nowhere", 0),
    "sethostname": (None, 0),
    "settimeofday": (None, None),
    "syslog": (3, None, 0),
    "acct": (b"/nowhere",),
    "pidfd_send_signal": (-1, 0, None, 0),
    "landlock_create_ruleset": (None, 0, 0),
    # Of these, some ways are open.
    "prctl": (4, 1, 0, 0, 0),  # PR_SET_DUMPABLE
    "prlimit64": (NOBODY, 0, None, None),
    "mprotect": (None, 0, WRITABLE_AND_EXECUTABLE),
    "mmap": (None, 4096, WRITABLE_AND_EXECUTABLE, PRIVATE_ANONYMOUS, -1, 0),
    "setsockopt": (-1, socket.SOL_SOCKET, 1, None, 0),
    "sendto": (-1, None, 0, 0, b"address", 7),
    "ioctl": (-1, 0x4C80, 0),  # LOOP_CTL_ADD
}
#: Kernels are built without these, so of the unsealed process they prove nothing.
OPTIONAL = {
    "bpf": (0, None, 0),
    "userfaultfd": (0,),
    "io_uring_setup": (0, None),
    "io_uring_enter": (-1, 0, 0, 0, None, 0),
    "io_uring_register": (-1, 0, None, 0),
    "init_module": (None, 0, b""),
    "finit_module": (-1, b"", 0),
    "delete_module": (b"nothing", 0),
    "kexec_load": (0, 0, None, 0),
}
FAMILIES = ("AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_ALG")


def call(name, arguments):
    """ "done", or the name of the errno value."""
    number = lib.seccomp_syscall_resolve_name(name.encode())
    wide = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    ctypes.set_errno(0)
    result = LIBC.syscall(ctypes.c_long(number), *wide)
    return "done" if result >= 0 or ctypes.get_errno() == 0 else errno.errorcode[ctypes.get_errno()]


def attempt(function, *arguments):
    try:
        result = function(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    if function is os.open:
        os.close(result)
    return "done"


def fork():
    """Started as a process, it ends at once."""
    if os.fork() == 0:
        os._exit(0)


def attempts(folder):
    yield from ((name, call(name, arguments)) for name, arguments in (CALLS | OPTIONAL).items())
    for family in FAMILIES:
        yield family, attempt(lambda number: socket.socket(number, socket.SOCK_DGRAM).close(), getattr(socket, family))
    yield "fork", attempt(fork)
    yield "make a file", attempt(os.open, folder / "new", os.O_WRONLY | os.O_CREAT, 0o600)
    yield "make a file without a name", attempt(os.open, folder, os.O_WRONLY | os.O_TMPFILE, 0o600)
    yield "read a file", attempt(os.open, folder / "file", os.O_RDONLY)
    yield "write a file", attempt(os.open, folder / "file", os.O_WRONLY)
    yield "read a folder", attempt(os.open, folder, os.O_RDONLY | os.O_DIRECTORY)
    yield "read what systemd keeps for tokens", attempt(os.open, "/var/lib/systemd", os.O_RDONLY | os.O_DIRECTORY)
    yield "read a block device", attempt(os.open, folder / "block", os.O_RDONLY)
    yield "write a block device", attempt(os.open, folder / "block", os.O_RDWR)
    yield "write /dev/null", attempt(os.open, "/dev/null", os.O_WRONLY)
    yield "write /proc", attempt(os.open, "/proc/self/comm", os.O_WRONLY)


def main(kind, folder):
    confine(os.getppid())
    if kind != "free":
        seal(tokens=kind == "tokens")
    sys.stdout.write(json.dumps(dict(attempts(Path(folder)))))
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
