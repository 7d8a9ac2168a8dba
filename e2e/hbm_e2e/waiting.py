"""Waiting for a condition, never for a time."""

import time
from collections.abc import Callable
from typing import TypeVar

from hbm_e2e.errors import HarnessError

T = TypeVar("T")


class TimedOut(HarnessError):
    """A condition did not come true in time."""


def wait_for(
    condition: Callable[[], T | None],
    timeout_s: float,
    what: str,
    every_s: float = 0.1,
    because: Callable[[], str] = lambda: "",
) -> T:
    """The first truthy value of `condition`; `TimedOut` names `what` and the reason at the end."""
    end = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            reason = because()
            raise TimedOut(f"waited {timeout_s:g} s for {what}" + (f": {reason}" if reason else ""))
        time.sleep(every_s)
