"""From flags to a running supervisor: what can be wrong is found before anything starts."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from hbm_pool.contracts.control_block import ControlBlockError, SidecarBlock
from pydantic import ValidationError

from hbm_sidecar.config import SidecarConfig
from hbm_sidecar.kernels import unpack
from hbm_sidecar.log import configure
from hbm_sidecar.partition import SidecarError, first_error
from hbm_sidecar.supervisor import ADMIN_FD, LOCK_FD, LOCK_FILE

_BACKLOG = 128
_QUIET: Final = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "PROMETHEUS_DISABLE_CREATED_SERIES": "true",
}
"""Nothing here gains from a second thread: idle ones cost memory and disturb the decision."""


class LaunchError(SidecarError):
    """The sidecar cannot be started as asked."""


def launch(given: Mapping[str, Any]) -> NoReturn:
    """Become the supervisor. `given`: flags that were set, by field name; the environment fills up.

    Raises `LaunchError` with one line that says what to change.
    """
    config = configuration(given)
    _make_directory(config.run_dir)
    lock = _take_lock(config.run_dir)
    listener = _bind(config.host, config.port)
    if config.ready_file is not None:
        _forget(config.ready_file)
    log = configure("launch")
    arguments = [sys.executable, "-P", "-m", "hbm_sidecar.supervisor"]
    try:
        SidecarBlock.create(config.run_dir)
        arguments.append("block-ready")
    except (ControlBlockError, OSError) as error:
        log.error("no control block: decisions are switched off until there is", why=str(error))
    os.set_inheritable(lock, True)
    listener.set_inheritable(True)
    environment = _QUIET | config.environment(os.environ)
    if problem := unpack(environment):
        log.warning("the twin will compile its kernels: it comes half a minute later", why=problem)
    environment[ADMIN_FD] = str(listener.fileno())
    environment[LOCK_FD] = str(lock)
    os.execve(sys.executable, arguments, environment)


def configuration(given: Mapping[str, Any]) -> SidecarConfig:
    """Flags over environment over defaults. Raises `LaunchError` naming the flag or variable."""
    try:
        return SidecarConfig(**given)
    except ValidationError as error:
        text = first_error(error)
        field, _, reason = text.partition(": ")
        named = f"HBM_{field.upper()}" if field not in given else f"--{field.replace('_', '-')}"
        raise LaunchError(text if field == "content" else f"{named}: {reason}") from error


def _make_directory(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"--run-dir {run_dir} cannot be made ({error.strerror}); choose one that can be written"
        ) from error
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise LaunchError(
            f"--run-dir {run_dir} cannot be written; choose another or change its mode"
        )


def _take_lock(run_dir: Path) -> int:
    """One sidecar per run directory. The lock is held as long as the supervisor lives."""
    path = run_dir / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LaunchError(f"{path} cannot be opened ({error.strerror})") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        raise LaunchError(
            f"--run-dir {run_dir} already has a sidecar (pid {holder}); stop it or use "
            "another directory"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _bind(host: str, port: int) -> socket.socket:
    """The listening socket of admin; made here so that its port outlives admin's restarts."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise LaunchError(f"--host {host}: {error.strerror}") from error
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise LaunchError(
            f"--port {port} on {host} cannot be used ({error.strerror}); --port 0 picks a free one"
        ) from error
    return listener


def _forget(ready_file: Path) -> None:
    """A ready file of an earlier run must not speak for this one."""
    try:
        ready_file.unlink(missing_ok=True)
        ready_file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"--ready-file {ready_file}: {error.strerror}") from error
