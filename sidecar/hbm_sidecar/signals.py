"""Waiting for blocked signals, one by one.

Not `signal.sigtimedwait`: when its process is stopped (SIGSTOP, a debugger, a frozen cgroup) and
goes on after the timeout, CPython answers with uninitialised memory, which may look like any
signal. The system's own call says which signal it took, or that there was none. Standard library
only: the supervisor waits here, too.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import Final

_SIGSET_BYTES: Final = 128
"""Of `sigset_t` on Linux, whatever the libc."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class SignalWait:
    """Takes pending ones of `signals`, which must be blocked in every thread.

    Takes one at a time: no handler, no race.
    """

    def __init__(
        self, signals: Iterable[signal.Signals], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._set = ctypes.create_string_buffer(_SIGSET_BYTES)
        self._libc.sigemptyset(self._set)
        for signum in signals:
            self._libc.sigaddset(self._set, signum)

    def take(self, timeout_s: float) -> signal.Signals | None:
        """The next signal, or None when none came within `timeout_s` seconds."""
        until = self._clock() + timeout_s
        left_s = timeout_s
        while True:
            seconds, rest_s = divmod(max(0.0, left_s), 1.0)
            wait = _Timespec(int(seconds), int(rest_s * 1e9))
            taken = self._libc.sigtimedwait(self._set, None, ctypes.byref(wait))
            if taken > 0:
                return signal.Signals(taken)
            fault = ctypes.get_errno()
            if fault == errno.EAGAIN:
                return None
            if fault != errno.EINTR:
                raise OSError(fault, os.strerror(fault))
            # It was stopped and goes on: what is left of the time still counts.
            left_s = until - self._clock()
