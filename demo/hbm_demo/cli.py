"""`hbm demo`. Light to import: what is heavy is imported by the command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from hbm_demo.interrupt import Cleanups
    from hbm_demo.settings import DemoSettings

DEFAULT_OUT = Path("out/demo")

app = typer.Typer(
    name="demo",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("demo")
def demo(
    seconds: Annotated[
        float, typer.Option(help="Length of all load together; the arms share it equally.")
    ] = 210.0,
    nodes: Annotated[int, typer.Option(help="Model servers, each with its sidecar.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    scenario: Annotated[
        str, typer.Option(help="A shipped scenario by name, or a YAML file of your own.")
    ] = "demo",
    trace: Annotated[
        Path | None,
        typer.Option(help="Your own log instead: CSV or Parquet with time, user, items."),
    ] = None,
    columns: Annotated[
        str, typer.Option(help="With --trace: the names of its columns.")
    ] = "time,user,items",
    rate: Annotated[float, typer.Option(help="With --trace: most requests per second.")] = 72.0,
    compare: Annotated[
        bool,
        typer.Option("--compare/--no-compare", help="Send everything again with α fixed."),
    ] = True,
    out: Annotated[
        Path, typer.Option(help="Folder for summary, report, requests and logs.")
    ] = Path("out/demo"),
    as_json: Annotated[
        bool, typer.Option("--json", help="The summary on stdout, everything else on stderr.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal requests and weights.")] = 1,
) -> None:
    """The whole system on this machine, under load, in a few minutes."""
    from pydantic import ValidationError

    from hbm_demo.settings import DemoSettings

    try:
        settings = DemoSettings.model_validate(
            {
                "seconds": seconds,
                "nodes": nodes,
                "device": device,
                "scenario": scenario,
                "trace": trace,
                "columns": columns,
                "rate": rate,
                "compare": compare,
                "out": out,
                "as_json": as_json,
                "seed": seed,
            }
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        flag = "json" if problem["loc"][0] == "as_json" else problem["loc"][0]
        _fail(f"--{flag}: {problem['msg']} (got {problem['input']!r})", 2)
    _run(settings)


def _run(settings: DemoSettings) -> None:
    from hbm_demo.interrupt import Cleanups, Stopped, run_stoppable

    cleanups = Cleanups()
    try:
        broken = run_stoppable(lambda: _show(settings, cleanups), cleanups)
    except Stopped as stopped:
        typer.echo("hbm demo: stopped; no process is left", err=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stopped.status)
    except _Failed as error:
        _fail(str(error), error.status)
    if broken:
        _fail("scores differ or invariants are broken: see summary.json", 1)


class _Failed(Exception):
    """The demo cannot start or go on; said by the main thread, unless a signal ended the demo."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def _show(settings: DemoSettings, cleanups: Cleanups) -> bool:
    """The demo and what it says; whether something was wrong with the answers."""
    import orjson
    from hbm_load.errors import LoadError
    from hbm_serving.errors import ConfigError
    from rich.console import Console

    from hbm_demo.errors import DemoError, ProcessFailed
    from hbm_demo.live import LiveView
    from hbm_demo.outcome import show
    from hbm_demo.run import run_demo

    console = Console(stderr=settings.as_json)
    view = LiveView(console)
    try:
        with cleanups.undone_by(view.close):
            summary, out = run_demo(settings, view, cleanups)
    except ProcessFailed as error:
        raise _Failed(str(error), 1) from error
    except (DemoError, LoadError, ConfigError) as error:
        raise _Failed(str(error), 2) from error
    show(console, summary, out)
    if settings.as_json:
        sys.stdout.buffer.write(orjson.dumps(summary, option=orjson.OPT_INDENT_2) + b"\n")
    return bool(summary["mismatched_scores"] or summary["integrity_violations"])


def _fail(text: str, status: int) -> NoReturn:
    typer.echo(f"hbm demo: {' '.join(text.split())}", err=True)
    raise typer.Exit(status)
