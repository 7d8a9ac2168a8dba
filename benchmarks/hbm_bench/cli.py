"""`hbm bench`: runs benchmarks by name and prints what they measured."""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="bench",
    help="Benchmarks: each number of docs/results.md, with its reference in the same run.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

MODULES = {
    "pool": "KV lookup + allocate, handing over extents, planned moves",
    "embedding": "row lookup + gather against torch.index_select; refill beside it",
    "replacement": "misses of the replacement rule against LRU, and the cost of an access",
    "control-block": "records, rings and digests between processes",
    "decide": "one decision, hot and paced",
    "gate": "burst gate: false alarms per hour on correlated traffic, delay of a change",
    "twin": "miniature simulation per request",
    "serving": "pipelined, serial and uncached server on the same requests",
    "router": "decision with 64 nodes; CPU per request, direct to backend beside it",
    "simulator": "50,000 requests on one simulated node; 64 nodes for ten minutes",
    "calibration": "the simulator against the reference server: hit rates, P50, P99",
}


def _machine() -> dict[str, Any]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version()}


def _rows(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [
            row
            for key, inner in value.items()
            for row in _rows(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, float):
        return [(prefix, f"{value:.4g}")]
    return [(prefix, str(value))]


def _run(name: str, quick: bool, seed: int, **options: Any) -> dict[str, Any]:
    module = importlib.import_module(f"hbm_bench.{name.replace('-', '_')}")
    started = time.perf_counter()
    figures = module.run(quick=quick, seed=seed, **options)
    return {
        "benchmark": name,
        "seed": seed,
        "quick": quick,
        "machine": _machine(),
        "wall_s": round(time.perf_counter() - started, 1),
        "figures": figures,
    }


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{result['benchmark']} (seed {result['seed']}, {result['wall_s']} s, "
        f"{result['machine']['cpu']}, {result['machine']['cores']} cores)",
        title_justify="left",
    )
    table.add_column("figure", overflow="fold")
    table.add_column("value", justify="right", overflow="fold")
    for row in _rows(result["figures"]):
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


Quick = Annotated[bool, typer.Option(help="Fewer repetitions: a smoke run, not for publication.")]
Seed = Annotated[int, typer.Option(help="Seed of every random generator.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output instead of a table.")]


def _command(name: str, description: str) -> None:
    def command(quick: Quick = False, seed: Seed = 1, as_json: Json = False) -> None:
        result = _run(name, quick, seed)
        if as_json:
            typer.echo(json.dumps(result, indent=2))
        else:
            _print(result)

    command.__doc__ = description[0].upper() + description[1:] + "."
    app.command(name)(command)


for _name, _description in MODULES.items():
    _command(_name, _description)


@app.command("all")
def run_all(
    quick: Quick = False,
    seed: Seed = 1,
    out: Annotated[Path, typer.Option(help="Folder for one JSON file per benchmark.")] = Path(
        "out/bench"
    ),
) -> None:
    """Every benchmark of this machine, one JSON file each."""
    out.mkdir(parents=True, exist_ok=True)
    for name in MODULES:
        result = _run(name, quick, seed)
        (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        _print(result)


@app.command("gpu")
def run_gpu(
    quick: Quick = False,
    seed: Seed = 1,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("out/bench/gpu.json"),
) -> None:
    """All GPU benchmarks, into one JSON file (exits 2 where there is no CUDA device)."""
    import torch

    if not torch.cuda.is_available():
        typer.echo("hbm bench gpu: no CUDA device is visible; run it on a GPU machine", err=True)
        raise typer.Exit(2)
    result = _run("gpu", quick, seed)
    result["machine"]["gpu"] = torch.cuda.get_device_name()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    _print(result)


@app.command("operator")
def run_operator(
    quick: Quick = False,
    seed: Seed = 1,
    partitions: Annotated[
        int, typer.Option(min=600, help="Pods in the full run, each with its sidecar.")
    ] = 5000,
    changes_per_s: Annotated[
        float, typer.Option(min=1, help="Rate of the single changes; the goal's is 100.")
    ] = 100.0,
    report_s: Annotated[
        float, typer.Option(min=1, help="Time between two reports of a sidecar, s.")
    ] = 30.0,
    as_json: Json = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write as well.")] = None,
) -> None:
    """The operator at scale: a real API server and etcd, no nodes (exits 1 if a goal is missed)."""
    from hbm_e2e.api_server import PROGRAMS
    from hbm_e2e.toolchain import Toolchain

    if missing := Toolchain().missing(PROGRAMS):
        typer.echo(
            f"hbm bench operator: not built: {', '.join(missing)}; run PYTHONPATH=e2e "
            f"python3.11 -m hbm_e2e build {' '.join(PROGRAMS)}",
            err=True,
        )
        raise typer.Exit(2)
    result = _run(
        *("operator", quick, seed),
        partitions=partitions,
        changes_per_s=changes_per_s,
        report_s=report_s,
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        _print(result)
    if not quick and not all(goal["met"] for goal in result["figures"]["goals"].values()):
        raise typer.Exit(1)
