"""What the processor offers for matrix products, and how to do without AMX for a comparison.

AMX makes bf16 and int8 products several times faster than AVX-512 does. Linux gives its registers
only to a process that asks, so a process that the kernel refuses computes as an older processor
would: torch, OpenVINO and ONNX Runtime alike. `ONEDNN_MAX_CPU_ISA` reaches the first two alone.
"""

import ctypes
import errno
import platform
import struct
import sys
from pathlib import Path

FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")

# From Linux: asm/prctl.h, linux/prctl.h, linux/seccomp.h and the call's number on x86-64.
_ARCH_PRCTL = 158
_GET_PERMITTED, _REQUEST = 0x1022, 0x1023
_AMX_TILES = 18
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_FILTER_MODE = 2
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
# Classic BPF: load a word of the call's record, compare with a constant, return.
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER_AT, _ARGUMENT_AT = 0, 16


def flags() -> tuple[str, ...]:
    """Those of `FLAGS` that the processor has, whether or not this process may use them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    known = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return tuple(flag for flag in FLAGS if flag in known)


def has_int8() -> bool:
    """Whether the processor multiplies int8 natively."""
    return bool({"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags()))


def refuse_amx() -> None:
    """Have the kernel refuse AMX to this process from now on; there is no way back.

    Raises `SystemExit` where that cannot be, or where AMX has been granted already.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise SystemExit("--without-amx works on Linux on x86-64 alone")
    libc = ctypes.CDLL(None, use_errno=True)
    if amx_granted():
        raise SystemExit("--without-amx comes too late: this process has AMX already")
    program = b"".join(
        struct.pack("<HBBI", *instruction)
        for instruction in (
            (_LOAD, 0, 0, _NUMBER_AT),
            (_IF_EQUAL, 0, 3, _ARCH_PRCTL),
            (_LOAD, 0, 0, _ARGUMENT_AT),
            (_IF_EQUAL, 0, 1, _REQUEST),
            (_RETURN, 0, 0, _FAIL | errno.EPERM),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    held = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions, and where they are.
    record = struct.pack("@HP", len(program) // 8, ctypes.addressof(held))
    given = libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _FILTER_MODE, record, 0, 0
    )
    if given != 0:
        raise SystemExit(f"--without-amx: the kernel answers {errno.errorcode[ctypes.get_errno()]}")


def amx_granted() -> bool:
    """Whether this process has asked for AMX and been given it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    granted = ctypes.c_uint64()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _GET_PERMITTED, ctypes.byref(granted)) != 0:
        return False  # a kernel that knows no such permission
    return bool(granted.value >> _AMX_TILES & 1)
