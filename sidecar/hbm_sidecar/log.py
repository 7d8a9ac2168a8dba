"""Logs: JSON where nobody watches, readable lines on a terminal. One event per fact."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def configure(process: str) -> Any:
    """A logger that stamps each event with the name of the process."""
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    return structlog.get_logger().bind(process=process)
