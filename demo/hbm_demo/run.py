"""The demo from start to end: arms, check of scores, sweep, summary, report."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import orjson
from hbm_load.cli import log_trace, scenario_trace
from hbm_load.trace import Trace
from hbm_serving.config import load_config

from hbm_demo.arm import ArmResult, View, run_arm
from hbm_demo.errors import DemoError
from hbm_demo.interrupt import Cleanups
from hbm_demo.optimum import find_optima
from hbm_demo.redis_server import redis_executable
from hbm_demo.score_check import check_scores
from hbm_demo.settings import MODEL_PRESET, DemoSettings
from hbm_demo.summary import summarise
from hbm_demo.system import ADAPTIVE, FIXED

_MAX_SIBLINGS: Final = 100


def run_demo(settings: DemoSettings, view: View, cleanups: Cleanups) -> tuple[dict[str, Any], Path]:
    """Runs everything; the summary and the folder it was written to.

    Raises `DemoError` or `hbm_load.LoadError` with one line. Whatever is raised, and when
    `cleanups` are stopped meanwhile, no process that was started is left.
    """
    started_s = time.monotonic()
    model = load_config(MODEL_PRESET)
    trace = _trace(settings, model.model.items, model.model.max_candidates)
    slo_ms = model.server.slo_ms
    redis_executable()
    arms = (ADAPTIVE, FIXED) if settings.compare else (ADAPTIVE,)
    with _output_folder(settings.out) as out, _run_folder(cleanups) as directory:
        if out != settings.out:
            view.say(f"{settings.out} belongs to a running demo; this one writes to {out}")
        results = [
            run_arm(
                settings,
                arm,
                trace,
                directory=directory / arm.name,
                out=out,
                model=model,
                view=view,
                cleanups=cleanups,
            )
            for arm in arms
        ]
        view.say("scoring a sample of the answers again, without caches")
        check = check_scores(
            {result.arm.name: result.records for result in results}, trace, settings.seed
        )
        view.say("sweeping fixed splits over what each node was sent")
        optima = find_optima(trace, results[0])
        summary = summarise(settings, results, optima, check, slo_ms, time.monotonic() - started_s)
        _write(out, summary, results, slo_ms)
    return summary, out


def _trace(settings: DemoSettings, catalogue: int, max_candidates: int) -> Trace:
    """The requests, exactly as the load generator makes them."""
    if settings.trace is not None:
        return log_trace(
            settings.trace,
            settings.seed,
            settings.arm_seconds,
            settings.rate,
            catalogue,
            columns=settings.columns,
        )
    trace = scenario_trace(settings.scenario, settings.seed, settings.arm_seconds)
    if trace.catalogue > catalogue:
        raise DemoError(
            f"scenario {settings.scenario} has {trace.catalogue} items, the demo's model "
            f"{catalogue}; use a smaller catalogue"
        )
    most = int((trace.candidate_offsets[1:] - trace.candidate_offsets[:-1]).max())
    if most > max_candidates:
        raise DemoError(
            f"scenario {settings.scenario} has requests with {most} candidates, the demo's model "
            f"takes {max_candidates}; use fewer"
        )
    return trace


def _write(out: Path, summary: dict[str, Any], results: list[ArmResult], slo_ms: float) -> None:
    from hbm_demo.report import render

    text = orjson.dumps(
        summary, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    )
    _replace(out / "summary.json", text)
    _replace(out / "report.html", render(summary, results, slo_ms).encode())


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    temporary.replace(path)


@contextmanager
def _output_folder(wanted: Path) -> Iterator[Path]:
    """`wanted`, or `wanted-2` and so on while another demo writes there."""
    for number in range(1, _MAX_SIBLINGS):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise DemoError(
                f"{folder} cannot be written to ({error.strerror}); choose another --out"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        try:
            for name in ("logs", "summary.json", "report.html"):
                _remove(folder / name)
            yield folder
        finally:
            os.close(lock)
        return
    raise DemoError(f"{wanted} and {_MAX_SIBLINGS} siblings are in use; choose another --out")


@contextmanager
def _run_folder(cleanups: Cleanups) -> Iterator[Path]:
    """A folder for sockets and control blocks, short enough for a socket's path."""
    folder = Path(tempfile.mkdtemp(prefix="hbm-", dir="/tmp" if os.path.isdir("/tmp") else None))
    with cleanups.undone_by(lambda: shutil.rmtree(folder, ignore_errors=True)):
        yield folder


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
