"""The process that runs a model's code; started by `sandbox`, imports nothing of xtuner.

Arguments: seconds of CPU time, bytes of memory, the folder that it may write to. The code comes
from standard input. Exit code 3 means that this machine cannot enforce the limits.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import os
import platform
import struct
import sys
import traceback
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER, _ALLOW, _REFUSE = 2, 0x7FFF0000, 0x00050001  # errno 1, EPERM
_KILL = 0x80000000
_X32 = 0x40000000
# fmt: off
_REFUSED = {
    "x86_64": (0xC000003E, (
        41, 42, 43, 44, 45, 46, 47, 49, 50, 53, 288, 299, 307,  # sockets
        56, 57, 58, 59, 322, 435,  # processes and programs
        62, 129, 200, 297, 424, 434, 438, 101, 310, 311,  # signals, tracing
        155, 161, 165, 166, 272, 308, 428, 429, 430, 431, 432, 433, 442,  # mounts, namespaces
        169, 175, 176, 246, 248, 249, 250, 298, 304, 313, 320, 321, 323, 425, 426, 427,
    )),
    "aarch64": (0xC00000B7, (
        198, 199, 200, 201, 202, 203, 206, 207, 211, 212, 242, 243, 269,
        220, 221, 281, 435,
        129, 130, 138, 240, 424, 434, 438, 117, 270, 271,
        39, 40, 41, 51, 97, 268, 428, 429, 430, 431, 432, 433, 442,
        104, 105, 106, 142, 217, 218, 219, 241, 265, 273, 280, 282, 425, 426, 427,
    )),
}
# fmt: on
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
_ALL_ACCESS = (1 << 13) - 1  # access rights of the first version of Landlock


def main() -> int:
    """Limit this process, then run the code."""
    seconds, memory, folder = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    code = sys.stdin.buffer.read().decode("utf-8", "replace")
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    if sys.platform != "linux" or machine not in _REFUSED:
        print("Python code runs only on Linux on x86-64 or ARM, where it can be sandboxed")
        return 3
    try:
        _limit(seconds, memory)
        libc = ctypes.CDLL(None, use_errno=True)
        _enter(libc, machine, folder)
    except OSError as error:
        print(f"this machine cannot sandbox Python code: {error}")
        return 3
    _run(code)
    return 0


def _limit(seconds: float, memory: int) -> None:
    import resource

    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: max(1, round(seconds)),
        resource.RLIMIT_FSIZE: 2**20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for name, most in limits.items():
        hard = resource.getrlimit(name)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(name, (value, value))


def _enter(libc: Any, machine: str, folder: str) -> None:
    _checked(libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0))
    _checked(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _keep_to_folders(libc, folder)
    arch, numbers = _REFUSED[machine]
    program = _filter(arch, numbers)
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    packed = ctypes.create_string_buffer(header, len(header))
    _checked(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(packed), 0, 0))


def _filter(arch: int, numbers: tuple[int, ...]) -> bytes:
    """A BPF program that refuses the system calls `numbers`."""
    load_arch, load_number = (0x20, 0, 0, 4), (0x20, 0, 0, 0)
    lines = [load_arch, (0x15, 1, 0, arch), (0x06, 0, 0, _KILL), load_number]
    lines.append((0x35, len(numbers) + 1, 0, _X32))  # x32 numbers of x86-64: the last instruction
    for left, number in zip(range(len(numbers) - 1, -1, -1), numbers, strict=True):
        lines.append((0x15, left + 1, 0, number))
    lines += [(0x06, 0, 0, _ALLOW), (0x06, 0, 0, _REFUSE)]
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def _keep_to_folders(libc: Any, folder: str) -> None:
    """Allow reading only Python's folders, and writing only `folder`; no effect without
    Landlock."""
    handled = struct.pack("Q", _ALL_ACCESS)
    ruleset = libc.syscall(_CREATE_RULESET, handled, len(handled), 0)
    if ruleset < 0:
        return
    readable = {sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), "/usr/share/zoneinfo"}
    readable |= {"/usr/lib", "/usr/lib64", "/lib", "/lib64", "/dev/urandom", "/dev/null"}
    for path in sorted(readable):
        _allow(libc, ruleset, path, _READ_FILE | _READ_FOLDER)
    _allow(libc, ruleset, folder, _ALL_ACCESS)
    _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _allow(libc: Any, ruleset: int, path: str, access: int) -> None:
    try:
        handle = os.open(path, getattr(os, "O_PATH", 0o10000000) | os.O_CLOEXEC)
    except OSError:
        return
    if not os.path.isdir(path):
        access &= _READ_FILE | 2
    rule = struct.pack("=Qi", access, handle)
    _checked(libc.syscall(_ADD_RULE, ruleset, 1, rule, 0))
    os.close(handle)


def _checked(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _run(code: str) -> None:
    """Run `code`; print the value of a last line that is an expression."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    try:
        tree = ast.parse(code)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<code>", "exec"), scope)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<code>", "eval"), scope)
            if value is not None:
                print(repr(value))
    except SystemExit:
        pass
    except BaseException as error:
        lines = traceback.format_exception(error)
        shown = [line for line in lines if "sandbox_child.py" not in line]
        print("".join(shown), end="")
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
