"""`hbm sweep`: the best static α of a workload, regime by regime, by exhaustive simulation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hbm_load.trace import Trace

    from hbm_sim.sweep import RegimeSweep, Sweep

app = typer.Typer(
    name="sweep",
    help="Exhaustive static sweep: the best α of a workload, by simulation.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def sweep(
    scenario: Annotated[
        str | None, typer.Option(help="Shipped scenario or YAML file (default: demo).")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Own log instead (CSV or Parquet: time, user, items).")
    ] = None,
    columns: Annotated[
        str, typer.Option(help="With --trace: its columns of time, user and items.")
    ] = "time,user,items",
    model_config: Annotated[
        str, typer.Option(help="Preset or YAML file of `hbm serve`: pool, tables, lengths.")
    ] = "demo",
    nodes: Annotated[
        int, typer.Option(min=1, max=1024, help="Nodes; users go to their hash home.")
    ] = 1,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.1, help="Length of the stream (default: the scenario's; log: 60)."),
    ] = None,
    rate: Annotated[
        float, typer.Option(min=0.001, help="With --trace: most requests per second.")
    ] = 36.0,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal requests.")] = 1,
    serial: Annotated[
        bool | None,
        typer.Option(
            "--serial/--overlap",
            help="Gather and compute one after the other, or overlapped (default: the file's).",
        ),
    ] = None,
    fixed_ms: Annotated[float, typer.Option(min=0.0, help="Compute of a request, ms.")] = 1.0,
    token_us: Annotated[
        float, typer.Option(min=0.0, help="Compute per computed token, µs (demo model, one core).")
    ] = 25.0,
    token_context_ns: Annotated[
        float, typer.Option(min=0.0, help="Compute per computed token and token of context, ns.")
    ] = 10.0,
    costs: Annotated[
        Path | None,
        typer.Option(help="JSON with fixed_ms, token_ms, token_context_ms, row_ms instead."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """α* per regime by mean service time and by tail latency, with plateau and curve.

    A missed row costs its bytes over the link of the model file. All candidates serve the same
    requests; the leading part of each regime is warm-up.
    """
    import dataclasses

    from hbm_load.errors import LoadError
    from hbm_pool.contracts.records import CostModel

    from hbm_sim.model_file import ModelFileError, costs_of, load_node
    from hbm_sim.requests import TraceRequests
    from hbm_sim.sweep import SweepError, static_sweep

    try:
        info, config = load_node(model_config)
        if serial is not None:
            model = CostModel.SERIAL if serial else CostModel.OVERLAP
            info = dataclasses.replace(info, cost_model=model)
        prices = costs_of(config, fixed_ms, token_us, token_context_ns)
        if costs is not None:
            prices = _read_costs(costs)
        workload = _workload(scenario, trace, columns, seconds, rate, seed, info.tables[0].rows)
        if workload.catalogue > info.tables[0].rows:
            raise SweepError(
                f"the workload has {workload.catalogue} items and the model "
                f"{info.tables[0].rows} rows; use a model with more rows or a smaller catalogue"
            )
        names = [f"node-{index}" for index in range(nodes)]
        with _Progress(as_json) as progress:
            result = static_sweep(
                TraceRequests(workload, info, names), info, prices, progress=progress.update
            )
    except (LoadError, ModelFileError, SweepError, OSError) as error:
        typer.echo(f"hbm sweep: {error}", err=True)
        raise typer.Exit(2) from error
    described: dict[str, Any] = {
        "workload": workload.name,
        "fingerprint": workload.fingerprint(),
        "seed": seed,
        "nodes": nodes,
        "model": info.model,
        "extents": info.extents,
    }
    if as_json:
        typer.echo(json.dumps({**described, **result.to_dict()}, indent=2))
    else:
        _print(result, described)


def _workload(
    scenario: str | None,
    trace: Path | None,
    columns: str,
    seconds: float | None,
    rate: float,
    seed: int,
    catalogue: int,
) -> Trace:
    from hbm_load.cli import log_trace
    from hbm_load.errors import ScenarioError
    from hbm_load.generate import generate
    from hbm_load.scenario import load_scenario

    if trace is None:
        return generate(load_scenario(scenario or "demo"), seed, duration_s=seconds)
    if scenario is not None:
        raise ScenarioError("give --scenario or --trace, not both")
    return log_trace(trace, seed, seconds or 60.0, rate, catalogue, columns=columns)


def _read_costs(path: Path) -> Any:
    from hbm_policy.costs import CostConstants

    from hbm_sim.sweep import SweepError

    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return CostConstants(
            float(raw["fixed_ms"]),
            float(raw["token_ms"]),
            float(raw["token_context_ms"]),
            tuple(float(value) for value in raw["row_ms"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise SweepError(
            f"{path}: not cost constants ({error}); give JSON with the numbers fixed_ms, token_ms, "
            "token_context_ms and the list row_ms"
        ) from error


class _Progress:
    """A bar on a terminal's stderr; nothing elsewhere."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._shown = Progress(
            TextColumn("sweep"),
            BarColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet or not sys.stderr.isatty(),
            transient=True,
        )
        self._task = self._shown.add_task("sweep")

    def __enter__(self) -> _Progress:
        self._shown.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.stop()

    def update(self, done: int, total: int) -> None:
        self._shown.update(self._task, completed=done, total=total)


def _print(result: Sweep, described: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{described['workload']}, {described['nodes']} node(s), {result.cost_model}, "
        f"{result.requests} requests",
        title_justify="left",
    )
    for name in ("regime", "node", "n", "α* (mean)", "plateau", "mean ms", "α* (tail)", "tail ms"):
        table.add_column(name, justify="left" if name in ("regime", "node") else "right")
    rows: list[RegimeSweep] = list(result.pooled)
    if len(result.by_node) > 1:
        rows += [each for regimes in result.by_node.values() for each in regimes]
    for each in rows:
        mean, tail = each.best_mean, each.best_tail
        table.add_row(
            each.regime,
            each.node or "all",
            str(each.requests),
            f"{mean.alpha:.3f}",
            f"{mean.plateau_low:.2f}-{mean.plateau_high:.2f}",
            f"{mean.value_ms:.3f}",
            "-" if tail is None else f"{tail.alpha:.3f}",
            "-" if tail is None else f"{tail.value_ms:.2f} (P{each.tail_percentile})",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
