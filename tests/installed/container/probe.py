# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs in the place of a service, inside its sandbox; tries what nobody should be able to do there, and what must go.

``python3 probe.py DEVICE``: prints one line of JSON, what was tried → ``done`` or the name of the error.  What a worker
can do is tried by a child that has been confined as a worker is.
"""

import ctypes
import errno
import json
import mmap
import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path

from luksrotd.worker.confine import confine

MS_BIND, CLONE_NEWNET, CLONE_NEWUSER, CLONE_NEWNS = 0x1000, 0x40000000, 0x10000000, 0x00020000
SYS_ADD_KEY, SYS_FINIT_MODULE, SYS_SECCOMP = 248, 313, 317  # of x86-64
SECCOMP_GET_ACTION_AVAIL, SECCOMP_RET_ALLOW = 2, 0x7FFF0000
PTRACE_SEIZE = 0x4206
AF_ALG, AF_PACKET = 38, 17
libc = ctypes.CDLL(None, use_errno=True)


def call(function, *arguments):
    """A function of the C library; raises what it failed with."""
    if getattr(libc, function)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), function)


def outcome(attempt):
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "done"


def in_child(attempt):
    """The same where it must not change this process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        os.write(writer, json.dumps(attempt()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        text = told.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else "ended"


def open_socket(family, kind=socket.SOCK_RAW, protocol=0):
    socket.socket(family, kind, protocol).close()


def touch(path):
    Path(path).write_text("probe")
    Path(path).unlink()


def open_file(path, flags):
    os.close(os.open(path, flags))


def mount(source, kind, flags):
    call("mount", source, b"/run/luksrotd", kind, flags, None)
    call("umount2", b"/run/luksrotd", 0)


def make_node():
    os.mknod("/run/luksrotd/node", 0o020600, os.makedev(1, 1))
    Path("/run/luksrotd/node").unlink()


def make_group():
    Path("/sys/fs/cgroup/probe").mkdir()
    Path("/sys/fs/cgroup/probe").rmdir()


SOCKETS = {
    "socket AF_INET": partial(open_socket, socket.AF_INET, socket.SOCK_DGRAM),
    "socket AF_INET6": partial(open_socket, socket.AF_INET6, socket.SOCK_DGRAM),
    "socket AF_PACKET": partial(open_socket, AF_PACKET),
    "socket AF_ALG": partial(open_socket, AF_ALG, socket.SOCK_SEQPACKET),
    "socket AF_NETLINK": partial(open_socket, socket.AF_NETLINK),
    "socket AF_UNIX": partial(open_socket, socket.AF_UNIX, socket.SOCK_STREAM),
}


def attempts(device):
    """What the service itself tries."""
    return SOCKETS | {
        "mount": partial(mount, b"none", b"tmpfs", 0),
        "bind mount": partial(mount, b"/etc", None, MS_BIND),
        "module": partial(call, "syscall", SYS_FINIT_MODULE, 0, b"", 0),
        "key": partial(call, "syscall", SYS_ADD_KEY, b"user", b"probe", b"x", ctypes.c_size_t(1), -3),
        "chroot": partial(os.chroot, "/usr"),
        "user namespace": partial(call, "unshare", CLONE_NEWUSER),
        "network namespace": partial(call, "unshare", CLONE_NEWNET),
        "mount namespace": partial(call, "unshare", CLONE_NEWNS),
        "ptrace": lambda: call("ptrace", PTRACE_SEIZE, os.getppid(), None, None),
        "priority": partial(os.setpriority, os.PRIO_PROCESS, 0, -5),
        "real time": partial(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1)),
        "host name": partial(socket.sethostname, "probe"),
        "chown": partial(os.chown, "/run/luksrotd", 0, 0),
        "writable code": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC).close(),
        "node": make_node,
        "/dev/mem": partial(open_file, "/dev/mem", os.O_RDONLY),
        "/dev/loop-control": partial(open_file, "/dev/loop-control", os.O_RDWR),
        "/etc": partial(touch, "/etc/probe"),
        "/usr": partial(touch, "/usr/probe"),
        "/home": partial(touch, "/home/probe"),
        "/root": partial(touch, "/root/probe"),
        "/srv": partial(touch, "/srv/probe"),
        "/var/lib": partial(touch, "/var/lib/probe"),
        "/run": partial(touch, "/run/probe"),
        "/proc/sys": partial(open_file, "/proc/sys/kernel/core_pattern", os.O_WRONLY),
        "/sys": partial(open_file, "/sys/block/" + Path(device).name + "/queue/read_ahead_kb", os.O_WRONLY),
        "cgroups": make_group,
        # What it needs.
        "device": partial(open_file, device, os.O_RDWR),
        "state": partial(touch, "/var/lib/luksrotd/probe"),
        "locks": partial(touch, "/run/luksrotd/probe"),
        "libcryptsetup's locks": partial(touch, "/run/cryptsetup/probe"),
        "temporary file": partial(touch, "/tmp/probe"),
        "key file in /root": partial(open_file, "/root/probe.key", os.O_RDONLY),
        "seccomp": seccomp_is_there,
    }


def seccomp_is_there():
    action = ctypes.c_uint32(SECCOMP_RET_ALLOW)
    call("syscall", SYS_SECCOMP, SECCOMP_GET_ACTION_AVAIL, 0, ctypes.byref(action))


def worker_attempts(device, parent):
    """What a worker tries, beside the sockets."""
    return SOCKETS | {
        "read device": partial(open_file, device, os.O_RDONLY),
        "write device": partial(open_file, device, os.O_RDWR),
        "device by its number": partial(os.mknod, "/tmp/probe", 0o060600, Path(device).stat().st_rdev),
        "key file": partial(open_file, "/root/probe.key", os.O_RDONLY),
        "state": partial(os.listdir, "/var/lib/luksrotd"),
        "locks": partial(os.listdir, "/run/luksrotd"),
        "kill": partial(os.kill, parent, 0),
        "ptrace": partial(call, "ptrace", PTRACE_SEIZE, parent, None, None),
        "root": partial(os.setresuid, 0, 0, 0),
        "user namespace": partial(call, "unshare", CLONE_NEWUSER),
    }


def as_worker(device):
    parent = os.getppid()
    confine(parent)
    return {what: outcome(attempt) for what, attempt in worker_attempts(device, parent).items()}


def main(device):
    found = {what: in_child(partial(outcome, attempt)) for what, attempt in attempts(device).items()}
    interfaces = sorted(name for _, name in socket.if_nameindex()) if found["socket AF_NETLINK"] == "done" else None
    network = str(Path("/proc/self/ns/net").readlink())
    worker = in_child(partial(as_worker, device))
    print(json.dumps({"service": found, "worker": worker, "interfaces": interfaces, "network": network}))  # noqa: T201 - what it is for


if __name__ == "__main__":
    main(sys.argv[1])
