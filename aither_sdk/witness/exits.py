"""How the service ended, as far as one who is not its parent can learn it."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import time

_INFO = struct.Struct("<QQIIIIIIIIIIIi")
"""struct pidfd_info of <linux/pidfd.h>: mask, cgroup, 11 ids, exit code."""
_GET_INFO = 0xC000_0000 | (_INFO.size << 16) | (0xFF << 8) | 11
_EXIT_KNOWN = 1 << 3
_PATIENCE_S = 0.3


def watch_exit(pid: int) -> int:
    """A descriptor for `how_it_ended`, taken while the process lives; -1 where there is none."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return -1


def how_it_ended(descriptor: int) -> str:
    """ "SIGKILL", "exit status 3" or "unknown". Blocks a moment: the kernel tells it once the
    process's parent has asked. Known from Linux 6.15 on."""
    if descriptor < 0:
        return "unknown"
    end_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end_s:
        buffer = bytearray(_INFO.size)
        _INFO.pack_into(buffer, 0, _EXIT_KNOWN, *(0,) * 13)
        try:
            fcntl.ioctl(descriptor, _GET_INFO, buffer)
        except OSError:
            return "unknown"
        mask, *_, status = _INFO.unpack(buffer)
        if mask & _EXIT_KNOWN:
            return spell_status(status)
        time.sleep(0.02)
    return "unknown"


def spell_status(status: int) -> str:
    """Of a wait status."""
    number = status & 0x7F
    if not number:
        return f"exit status {status >> 8 & 0xFF}"
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
