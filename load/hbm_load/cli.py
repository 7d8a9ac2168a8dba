"""`python -m hbm_load`: sends a scenario or a log to a router or server and records each answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hbm_load.client import LoadConfig
    from hbm_load.trace import Trace

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def load(
    url: Annotated[str, typer.Option(help="http://host:port of the router or server.")],
    records: Annotated[Path, typer.Option(help="Parquet file to write, one row per request.")],
    scenario: Annotated[str, typer.Option(help="Shipped scenario or YAML file.")] = "demo",
    trace: Annotated[
        Path | None, typer.Option(help="Own log instead (CSV or Parquet: time, user, items).")
    ] = None,
    columns: Annotated[
        str, typer.Option(help="With --trace: its columns of time, user and items.")
    ] = "time,user,items",
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of the run.")] = 60.0,
    rate: Annotated[
        float, typer.Option(min=0.001, help="With --trace: most requests per second.")
    ] = 72.0,
    rate_scale: Annotated[
        float, typer.Option(min=0.001, help="With --scenario: factor on its rates.")
    ] = 1.0,
    catalogue: Annotated[
        int | None, typer.Option(min=1, help="With --trace: item ids the model has.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal requests.")] = 1,
    slo_ms: Annotated[float, typer.Option(min=0.001, help="For the attainment shown.")] = 50.0,
    timeout_s: Annotated[float, typer.Option(min=0.001)] = 10.0,
    sample_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of answers whose scores are kept.")
    ] = 0.01,
    progress_s: Annotated[
        float, typer.Option(min=0.0, help="A JSON line to stdout this often; 0: none.")
    ] = 0.0,
) -> None:
    """Open loop: every request leaves at its intended time, and latency counts from it."""
    from hbm_load.client import LoadConfig
    from hbm_load.errors import LoadError

    try:
        workload = (
            scenario_trace(scenario, seed, seconds, rate_scale)
            if trace is None
            else log_trace(trace, seed, seconds, rate, catalogue, columns=columns)
        )
        config = LoadConfig(url=url, timeout_s=timeout_s, sample_share=sample_share)
        _send(workload, config, records, slo_ms, progress_s)
    except (LoadError, OSError) as error:
        typer.echo(f"hbm_load: {error}", err=True)
        raise typer.Exit(2) from error


def scenario_trace(source: str, seed: int, seconds: float, rate_scale: float = 1.0) -> Trace:
    """The trace of a scenario. Raises `ScenarioError`."""
    from hbm_load.generate import generate
    from hbm_load.scenario import load_scenario

    return generate(load_scenario(source), seed, duration_s=seconds, rate_scale=rate_scale)


def log_trace(
    path: Path,
    seed: int,
    seconds: float,
    rate: float,
    catalogue: int | None,
    *,
    candidates: int = 64,
    columns: str = "time,user,items",
) -> Trace:
    """The trace of a user's log, compressed into `seconds`. Raises `LogError`.

    Rejected lines are reported on stderr.
    """
    from hbm_load.errors import LogError
    from hbm_load.reader import LogColumns, read_log

    names = [name.strip() for name in columns.split(",")]
    if len(names) != 3 or not all(names):
        raise LogError(f"columns is {columns!r}; name three: time,user,items")
    log = read_log(
        path,
        LogColumns(names[0], names[1], names[2]),
        catalogue=catalogue,
        candidates=candidates,
        seed=seed,
    )
    report = log.report
    if report.rejected:
        typer.echo(
            f"{path}: {report.rejected} of {report.lines} lines rejected; first: "
            + "; ".join(report.quoted[:3]),
            err=True,
        )
    if report.folded_items:
        typer.echo(
            f"{path}: {report.folded_items} items beyond the model's {catalogue} share rows with "
            "others",
            err=True,
        )
    return log.trace.compressed(seconds, rate)


def _send(
    trace: Trace, config: LoadConfig, records: Path, slo_ms: float, progress_s: float
) -> None:
    import asyncio
    import signal

    import orjson
    import uvloop

    from hbm_load.client import LoadClient
    from hbm_load.progress import Progress, ProgressCounter

    def show(progress: Progress) -> None:
        sys.stdout.buffer.write(orjson.dumps(progress._asdict()) + b"\n")
        sys.stdout.buffer.flush()

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        client = LoadClient(
            trace,
            config,
            on_done=lambda index: counter.done(index),
            meta={"trace": trace.fingerprint(), "slo_ms": slo_ms},
        )
        counter = ProgressCounter(client.records, slo_ms)
        sending = loop.create_task(client.run(stop))
        while progress_s > 0.0 and not sending.done():
            await asyncio.wait([sending], timeout=progress_s)
            show(counter.snapshot(client.in_flight))
        (await sending).write(records)

    uvloop.run(run())
