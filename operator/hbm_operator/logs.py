"""Logs of the operator: JSON lines, or readable ones on a terminal. To standard error."""

from __future__ import annotations

import logging
import sys

import structlog


def configure_logs(level: str) -> None:
    """One event per fact.

    Args:
        level: debug, info, warning or error.
    """
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer()
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


class _Forwarding(logging.Handler):
    """Log records of a library as events of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger().bind(logger=record.name)
        log.log(record.levelno, record.getMessage(), exc_info=record.exc_info)


def adopt_library_logs(level: int = logging.WARNING) -> None:
    """What libraries have to say, from `level` on, in the same form as our own logs."""
    logging.basicConfig(handlers=[_Forwarding()], level=level, force=True)
    # Signals are ours to handle; kopf warns that it does not.
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)
