"""Logs of the webhook as a pod writes them."""

from __future__ import annotations

import pytest
from hbm_operator.logs import configure_logs


@pytest.fixture(autouse=True)
def _logs() -> None:
    configure_logs("info")
