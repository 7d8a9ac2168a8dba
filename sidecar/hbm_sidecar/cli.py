"""`hbm sidecar` and `hbm explain`. Light to import: what is heavy is imported by the command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer


def _fail(command: str, text: str) -> NoReturn:
    """One line on stderr, exit 2."""
    typer.echo(f"{command}: {' '.join(text.split())}", err=True)
    raise typer.Exit(2)


def _app(name: str) -> typer.Typer:
    return typer.Typer(
        name=name,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


sidecar = _app("sidecar")
explain = _app("explain")


@sidecar.command("sidecar")
def run_sidecar(
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Directory shared with the model server. [HBM_RUN_DIR, default /run/hbm]"
        ),
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="Name of this node in Redis. [HBM_NODE, default: host name]")
    ] = None,
    node_url: Annotated[
        str | None,
        typer.Option(help="Where the router reaches the model server. [HBM_NODE_URL]"),
    ] = None,
    namespace: Annotated[
        str | None, typer.Option(help="Namespace of all keys in Redis. [HBM_NAMESPACE, default]")
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(help="redis://, rediss:// or unix://; without it no digest. [HBM_REDIS_URL]"),
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="auto, recommend, fixed or hold. [HBM_MODE, auto]")
    ] = None,
    alpha_min: Annotated[
        float | None, typer.Option(help="Lower bound of α. [HBM_ALPHA_MIN, 0.1]")
    ] = None,
    alpha_max: Annotated[
        float | None, typer.Option(help="Upper bound of α. [HBM_ALPHA_MAX, 0.9]")
    ] = None,
    alpha_fixed: Annotated[
        float | None, typer.Option(help="α of mode fixed. [HBM_ALPHA_FIXED]")
    ] = None,
    slo_ms: Annotated[
        float | None,
        typer.Option(help="Latency goal, ms; 0: the server's own. [HBM_SLO_MS, 0]"),
    ] = None,
    tick_ms: Annotated[
        float | None, typer.Option(help="Time between decisions, ms. [HBM_TICK_MS, 250]")
    ] = None,
    refill_bytes_per_s: Annotated[
        float | None,
        typer.Option(help="Budget of background copies; 0: none. [HBM_REFILL_BYTES_PER_S, 2^28]"),
    ] = None,
    policy_file: Annotated[
        Path | None,
        typer.Option(help="JSON partition written by somebody else. [HBM_POLICY_FILE]"),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address of /healthz, /readyz, /metrics. [HBM_HOST, 127.0.0.1]"),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Their port; 0: any free one. [HBM_PORT, 9400]")
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="Written once the sidecar serves. [HBM_READY_FILE]")
    ] = None,
    stale_ms: Annotated[
        float | None,
        typer.Option(help="Telemetry older than this: server dead. [HBM_STALE_MS, 2000]"),
    ] = None,
    heartbeat_ms: Annotated[
        float | None,
        typer.Option(help="Time between heartbeats to Redis. [HBM_HEARTBEAT_MS, 250]"),
    ] = None,
) -> None:
    """Decides α for the model server beside it; restarts its own parts and never exits for them."""
    given = {name: value for name, value in locals().items() if value is not None}
    from hbm_sidecar.launch import LaunchError, launch

    try:
        launch(given)
    except LaunchError as error:
        _fail("hbm sidecar", str(error))


@explain.command("explain")
def run_explain(
    run_dir: Annotated[
        Path, typer.Option(help="Run directory of the sidecar.", envvar="HBM_RUN_DIR")
    ] = Path("/run/hbm"),
    last: Annotated[int, typer.Option(min=1, max=10_000, help="How many decisions.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON array on stdout.")] = False,
) -> None:
    """Why the sidecar took its last decisions, oldest first."""
    from hbm_sidecar.explain import ExplainError, fetch_explained, human_line, to_json

    try:
        decisions = fetch_explained(run_dir, last)
    except ExplainError as error:
        _fail("hbm explain", str(error))
    if as_json:
        sys.stdout.write(to_json(decisions) + os.linesep)
        return
    if not decisions:
        typer.echo("no decision yet", err=True)
    for decision in decisions:
        typer.echo(human_line(decision))
