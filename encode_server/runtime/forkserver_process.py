"""The forkserver process: imports once what ranks and preparers need, then forks them on request.

The process keeps one thread and never initialises CUDA, or its children could not use either. Run as
`python -m encode_server.runtime.forkserver_process` by `runtime.forkserver`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import traceback
from importlib import import_module

from encode_server.runtime.leaving import leave
from encode_server.runtime.mapped import release_libraries
from encode_server.wire.forks import LARGEST, Exited, Fork, Forked, decode_fork, encode

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
MOST_DESCRIPTORS = 16


def serve(control: socket.socket) -> None:
    """Fork a child for each packet, and report each child's end, until the front closes its end of `control`."""
    ended, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(ended, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poller.poll()}
        if ended in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(ended, 4096)
            _report_ended(control)
        if control.fileno() in ready:
            data, fds, _, _ = socket.recv_fds(control, LARGEST, MOST_DESCRIPTORS)
            if not data:
                return
            _fork(control, decode_fork(data), fds, (ended, wake))


def _fork(control: socket.socket, fork: Fork, fds: list[int], ours: tuple[int, ...]) -> None:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _be_child(control, fork, fds, ours, parent)
    pidfd = os.pidfd_open(pid)
    socket.send_fds(control, [encode(Forked(fork.number, pid))], [pidfd])
    for fd in (pidfd, *fds):
        os.close(fd)


def _be_child(control: socket.socket, fork: Fork, fds: list[int], ours: tuple[int, ...], parent: int) -> None:
    """Run the entry, and end the process with what it returns."""
    status = 1
    try:
        die_with(parent)
        name_process(fork.name)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        gc.enable()
        control.close()
        for fd in ours:
            os.close(fd)
        module, _, function = fork.entry.partition(":")
        status = getattr(import_module(module), function)(fork.argument, fds)
    except BaseException:
        traceback.print_exc()
    finally:
        leave(status)


def _report_ended(control: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        control.send(encode(Exited(pid, os.waitstatus_to_exitcode(status))))


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies, however the parent dies."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the request
        os._exit(1)


def name_process(name: str) -> None:
    """Set the name that `ps` and `top` show; the kernel keeps 15 characters."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def main() -> int:
    """Import, then serve."""
    parser = argparse.ArgumentParser(prog="encode_server.runtime.forkserver_process")
    parser.add_argument("--socket", required=True, type=int)
    parser.add_argument("--parent", required=True, type=int)
    parser.add_argument("--setup", required=True)
    parser.add_argument("--argument", default="")
    args = parser.parse_args()
    die_with(args.parent)
    name_process("forkserver")
    for signum in (signal.SIGINT, signal.SIGTERM):  # for the front, which ends its children when their work has ended
        signal.signal(signum, signal.SIG_IGN)
    # Collections while torch is imported take a second of the start, and find next to nothing.
    gc.disable()
    module, _, function = args.setup.partition(":")
    getattr(import_module(module), function)(bytes.fromhex(args.argument))
    # What is imported stays: a child's garbage collection would otherwise write to, and so copy, every shared page.
    gc.freeze()
    release_libraries()
    with socket.socket(fileno=args.socket) as control:
        serve(control)
    return 0


if __name__ == "__main__":
    leave(main())
