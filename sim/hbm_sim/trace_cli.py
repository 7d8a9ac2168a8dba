"""`hbm trace describe`: what a workload or a user's own log is like."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="trace",
    help="What a workload or an access log is like: α*, reuse, hot users, dispersion.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _trace() -> None:
    """What a workload or an access log is like."""


@app.command("describe")
def describe_command(
    source: Annotated[
        str, typer.Argument(help="A study workload (name or YAML), or a log (CSV, Parquet, JSON).")
    ],
    columns: Annotated[
        str, typer.Option(help="Of a log: its columns of time, user and items.")
    ] = "time,user,items",
    log_format: Annotated[
        str | None,
        typer.Option("--format", help="Of a log: taobao, amazon, kuairand, or your own (default)."),
    ] = None,
    node: Annotated[
        str, typer.Option(help="Of a log: the workload whose node serves it.")
    ] = "steady",
    gather: Annotated[
        str | None, typer.Option(help="serial or overlap (default: the node's).")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1.0, help="Of a log: replayed within this time.")
    ] = 600.0,
    rate: Annotated[
        float, typer.Option(min=0.001, help="Of a log: at most so many requests per second.")
    ] = 50.0,
    load: Annotated[float, typer.Option(min=0.01, help="Of a workload: its load.")] = 1.0,
    qps: Annotated[
        float | None, typer.Option(min=0.01, help="Of a workload: one rate for all regimes.")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="At most so many requests.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    fine: Annotated[
        bool,
        typer.Option("--fine/--coarse", help="Refine α* to 0.0125 (default), or stop at 0.05."),
    ] = True,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    report: Annotated[
        Path | None, typer.Option(help="Plots: one .html, or .png files beside each other.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Characterises a workload or a log on a node.

    Per regime: arrivals and their dispersion, histories, revisits, hot users, reuse curves of users
    and rows, and α* by mean service time and by P99 with its plateau.
    """
    from hbm_load.errors import LoadError

    from hbm_sim.describe import describe
    from hbm_sim.engine import EngineError
    from hbm_sim.stream import make_stream
    from hbm_sim.trace_report import write_report
    from hbm_sim.workload import WorkloadError, load_workload, workloads

    try:
        if gather not in (None, "serial", "overlap"):
            raise WorkloadError(f"gather is {gather!r}; use serial or overlap")
        is_workload = source in workloads() or Path(source).suffix in (".yaml", ".yml")
        if is_workload:
            workload = load_workload(source)
            if gather is not None:
                workload = workload.with_gather(gather)  # type: ignore[arg-type]
            stream = make_stream(workload, seed, load=load, qps=qps, requests=requests)
        else:
            workload, stream = _of_log(
                Path(source), columns, log_format, node, gather, seconds, rate, requests, seed
            )
        if report is not None and report.suffix not in (".html", ".png"):
            raise WorkloadError(f"{report}: a report is .html or .png")
        found = describe(stream, workload.node_spec(), fine=fine, jobs=jobs)
        written = write_report(found, report) if report is not None else []
    except (LoadError, WorkloadError, EngineError, OSError) as error:
        typer.echo(f"hbm trace: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _print(found)
    for path in written:
        typer.echo(f"written: {path}", err=as_json)


def _of_log(
    path: Path,
    columns: str,
    log_format: str | None,
    node: str,
    gather: str | None,
    seconds: float,
    rate: float,
    requests: int | None,
    seed: int,
) -> tuple[Any, Any]:
    from hbm_load.errors import LogError
    from hbm_load.reader import LogColumns, read_log
    from hbm_load.reader_formats import columns_of

    from hbm_sim.trace_stream import node_for, stream_of_trace
    from hbm_sim.workload import load_workload

    names = columns.split(",")
    if len(names) != 3:
        raise LogError(f"columns {columns!r}: name three, of time, user and items")
    chosen = LogColumns(time=names[0], user=names[1], items=names[2])
    if log_format is not None:
        chosen = columns_of(log_format, path)
    workload = load_workload(node)
    if gather is not None:
        workload = workload.with_gather(gather)  # type: ignore[arg-type]
    regime = next(iter(workload.regimes.values()))
    trace = read_log(path, chosen, candidates=regime.candidates, seed=seed).trace
    most = rate * seconds if requests is None else min(requests, rate * seconds)
    trace = trace.compressed(most / rate, rate)
    workload = node_for(trace, workload)
    return workload, stream_of_trace(trace, workload)


def _print(found: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from hbm_sim.trace_report import TITLES, summary, table_rows

    table = Table(title=found.name, title_justify="left")
    for title in TITLES:
        table.add_column(title, justify="left" if title == "regime" else "right")
    for row in table_rows(found):
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(summary(found), highlight=False)
