"""Ctrl-C at any moment.

The work runs in a thread of its own; the main thread, the only one that signals reach, does
nothing but wait. So a signal interrupts no import, no lock and no half-started process: the main
thread ends what was started, in its own time. An exception raised by the signal's handler would
land wherever the work happens to be, and be lost there (in a callback) or leave a lock behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

T = TypeVar("T")

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """A signal ended the work. Its thread may still be busy: leave by `os._exit`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


class Cleanups:
    """What must be undone when the work is stopped; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._undo: list[Callable[[], None]] = []
        self._stopped = False

    @contextlib.contextmanager
    def undone_by(self, undo: Callable[[], None]) -> Iterator[None]:
        """Calls `undo` when the block is left or the work is stopped, whichever is first; never
        twice. Entered after a stop, the block is not run: SystemExit ends the work's thread."""
        with self._lock:
            if self._stopped:
                raise SystemExit
            self._undo.append(undo)
        try:
            yield
        finally:
            with self._lock:
                if undo in self._undo:
                    self._undo.remove(undo)
                    undo()

    def stop(self) -> None:
        """Undoes everything, newest first."""
        self._stopped = True  # before the lock, for which the work may be quicker again and again
        with self._lock:
            while self._undo:
                self._undo.pop()()


def run_stoppable(work: Callable[[], T], cleanups: Cleanups) -> T:
    """Runs `work` in another thread and returns what it returns, or raises what it raises.

    On SIGINT, SIGTERM or SIGHUP everything is undone and `Stopped` is raised. Main thread only.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []
    # Python runs no handler while the main thread sleeps in a lock and the signal came just before;
    # a byte in a pipe is seen whenever it came.
    happened, tell = os.pipe()
    os.set_blocking(tell, False)

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            failure.append(error)
        finally:
            os.write(tell, b"\0")

    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    fd_before = signal.set_wakeup_fd(tell)
    worker = threading.Thread(target=run, name="demo", daemon=True)
    worker.start()
    caught = os.read(happened, 1)[0]
    if caught in SIGNALS:
        # The handlers stay: a second Ctrl-C must not interrupt the cleaning up.
        cleanups.stop()
        raise Stopped(caught)
    worker.join()
    signal.set_wakeup_fd(fd_before)
    for number, handler in before.items():
        signal.signal(number, handler)
    os.close(happened)
    os.close(tell)
    if failure:
        raise failure[0]
    return outcome[0]
