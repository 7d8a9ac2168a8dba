"""`hbm sidecar`, `hbm explain` and `hbm replay-decisions`.

Light to import: what is heavy is imported by the command.
"""

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


replay = _app("replay-decisions")
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
    redis_url_file: Annotated[
        Path | None,
        typer.Option(help="File with that URL; may come and change. [HBM_REDIS_URL_FILE]"),
    ] = None,
    kube_token_dir: Annotated[
        Path | None,
        typer.Option(help="Token of this pod: follow its HBMPartition. [HBM_KUBE_TOKEN_DIR]"),
    ] = None,
    pod_name: Annotated[str | None, typer.Option(help="Name of this pod. [HBM_POD_NAME]")] = None,
    pod_uid: Annotated[str | None, typer.Option(help="Uid of this pod. [HBM_POD_UID]")] = None,
    policies_dir: Annotated[
        Path | None,
        typer.Option(help="Learned policies. [HBM_POLICIES_DIR, default /etc/hbm/policies]"),
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
    alpha_initial: Annotated[
        float | None,
        typer.Option(help="α for a server without any command yet. [HBM_ALPHA_INITIAL]"),
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
    ttl_heartbeats: Annotated[
        int | None,
        typer.Option(help="Heartbeats until the node's keys expire. [HBM_TTL_HEARTBEATS, 4]"),
    ] = None,
    digest_every: Annotated[
        int | None,
        typer.Option(help="Heartbeats between unchanged digests. [HBM_DIGEST_EVERY, 8]"),
    ] = None,
    snapshot_refresh_s: Annotated[
        float | None,
        typer.Option(help="Time between snapshots; 0: never. [HBM_SNAPSHOT_REFRESH_S, 10]"),
    ] = None,
    twin_budget: Annotated[
        float | None, typer.Option(help="Share of a core for the twin. [HBM_TWIN_BUDGET, 0.2]")
    ] = None,
    slew_per_s: Annotated[
        float | None, typer.Option(help="Speed of a move, α per second. [HBM_SLEW_PER_S, 0.05]")
    ] = None,
    move_fraction: Annotated[
        float | None,
        typer.Option(help="Part of the way to α̂ that one move goes. [HBM_MOVE_FRACTION, 0.75]"),
    ] = None,
    min_change: Annotated[
        float | None, typer.Option(help="No move starts this close to α̂. [HBM_MIN_CHANGE, 0.02]")
    ] = None,
    min_gain: Annotated[
        float | None,
        typer.Option(help="Share of the cost that a move must save. [HBM_MIN_GAIN, 0.01]"),
    ] = None,
    min_gain_ms: Annotated[
        float | None,
        typer.Option(help="As --min-gain, ms per request; both count. [HBM_MIN_GAIN_MS, 0]"),
    ] = None,
    dwell_ms: Annotated[
        float | None, typer.Option(help="Least time between moves. [HBM_DWELL_MS, 1000]")
    ] = None,
    dwell_accesses_per_slot: Annotated[
        float | None,
        typer.Option(
            help="EMB accesses per slot between moves. [HBM_DWELL_ACCESSES_PER_SLOT, 0.8]"
        ),
    ] = None,
    dwell_requests: Annotated[
        float | None,
        typer.Option(help="Requests between moves, if these are fewer. [HBM_DWELL_REQUESTS, 128]"),
    ] = None,
    dwell_double_change: Annotated[
        float | None,
        typer.Option(
            help="A move of this |Δα| doubles the next dwell. [HBM_DWELL_DOUBLE_CHANGE, 0.3]"
        ),
    ] = None,
    drop_wait_slo: Annotated[
        float | None,
        typer.Option(
            help="Wait, as a share of the goal, at which EMB drops rows. [HBM_DROP_WAIT_SLO, 0.5]"
        ),
    ] = None,
    refill_link_busy: Annotated[
        float | None,
        typer.Option(help="No refill on a link busier than this. [HBM_REFILL_LINK_BUSY, 0.9]"),
    ] = None,
    clock_slack_ms: Annotated[
        float | None,
        typer.Option(help="Telemetry may be this far ahead. [HBM_CLOCK_SLACK_MS, 50]"),
    ] = None,
    smoothing_requests: Annotated[
        float | None,
        typer.Option(
            help="Requests until an old curve counts for 37 %. [HBM_SMOOTHING_REQUESTS, 128]"
        ),
    ] = None,
    keep_gain: Annotated[
        float | None,
        typer.Option(help="Share of the cost for which α̂ moves. [HBM_KEEP_GAIN, 0.0005]"),
    ] = None,
    keep_gain_ms: Annotated[
        float | None,
        typer.Option(help="As --keep-gain, ms per request; both count. [HBM_KEEP_GAIN_MS, 0]"),
    ] = None,
    min_warm: Annotated[
        float | None,
        typer.Option(help="Warm share from which the twin is trusted. [HBM_MIN_WARM, 0.8]"),
    ] = None,
    curve_stale_ms: Annotated[
        float | None,
        typer.Option(help="Curve older than this: twin dead. [HBM_CURVE_STALE_MS, 2000]"),
    ] = None,
    gate_threshold: Annotated[
        float | None,
        typer.Option(
            help="Evidence at which the burst gate opens; 0: never. [HBM_GATE_THRESHOLD, 8]"
        ),
    ] = None,
    gate_drift: Annotated[
        float | None,
        typer.Option(help="Deviations that are no evidence. [HBM_GATE_DRIFT, 1]"),
    ] = None,
    gate_baseline_samples: Annotated[
        int | None,
        typer.Option(help="Samples behind what is normal. [HBM_GATE_BASELINE_SAMPLES, 256]"),
    ] = None,
    gate_requests: Annotated[
        int | None,
        typer.Option(help="Simulated requests per sample of the cost. [HBM_GATE_REQUESTS, 16]"),
    ] = None,
    gate_burst_ticks: Annotated[
        int | None,
        typer.Option(help="Ticks for which the gate stays open. [HBM_GATE_BURST_TICKS, 16]"),
    ] = None,
    gate_refractory_ticks: Annotated[
        int | None,
        typer.Option(help="Least ticks between openings. [HBM_GATE_REFRACTORY_TICKS, 32]"),
    ] = None,
    gate_slew: Annotated[
        float | None,
        typer.Option(help="Speed of moves while it is open, as a factor. [HBM_GATE_SLEW, 2]"),
    ] = None,
    gate_recover_ms: Annotated[
        float | None,
        typer.Option(help="Longest recovery after a burst. [HBM_GATE_RECOVER_MS, 10000]"),
    ] = None,
    adapter_limit: Annotated[
        float | None,
        typer.Option(
            help="Learned prices stay within this factor; 1: not learned. [HBM_ADAPTER_LIMIT, 4]"
        ),
    ] = None,
    adapter_forgetting: Annotated[
        float | None,
        typer.Option(
            help="Weight a batch keeps after each later one. [HBM_ADAPTER_FORGETTING, 0.9995]"
        ),
    ] = None,
    residual_gain: Annotated[
        float | None,
        typer.Option(
            help="Share of the learned correction that is taken; 0: none. [HBM_RESIDUAL_GAIN, 0]"
        ),
    ] = None,
    residual_wait_ticks: Annotated[
        int | None,
        typer.Option(help="Ticks for which it may put a move off. [HBM_RESIDUAL_WAIT_TICKS, 40]"),
    ] = None,
    residual_file: Annotated[
        Path | None,
        typer.Option(help="ONNX file of a learned residual. [HBM_RESIDUAL_FILE]"),
    ] = None,
    residual_sha256: Annotated[
        str | None, typer.Option(help="Its hash, in hex. [HBM_RESIDUAL_SHA256]")
    ] = None,
    decision_log: Annotated[
        Path | None,
        typer.Option(
            help="File that takes every decision, for `hbm replay-decisions`. [HBM_DECISION_LOG]"
        ),
    ] = None,
    decision_log_bytes: Annotated[
        int | None,
        typer.Option(help="Its largest size. [HBM_DECISION_LOG_BYTES, 2^26]"),
    ] = None,
) -> None:
    """Decides α for the model server beside it; restarts its own parts and never exits for them."""
    given = {name: value for name, value in locals().items() if value is not None}
    from hbm_sidecar.launch import LaunchError, launch

    try:
        launch(given)
    except LaunchError as error:
        _fail("hbm sidecar", str(error))


@replay.command("replay-decisions")
def run_replay(
    log: Annotated[Path, typer.Argument(help="File of `hbm sidecar --decision-log`.")],
    residuals: Annotated[
        Path | None,
        typer.Option(help="Directory of residual-HASH.onnx; by default the log's own."),
    ] = None,
) -> None:
    """Decide a log of decisions again and compare, bit for bit.

    Exit 0: all the same; 1: the first difference is said; 2: this is no log that can be replayed.
    """
    from hbm_policy.replay import ReplayError
    from hbm_policy.replay import replay as decide_again

    try:
        with log.open(encoding="utf-8", newline="\n") as lines:
            found = decide_again(lines, residuals or log.parent)
    except (OSError, UnicodeDecodeError) as error:
        _fail("hbm replay-decisions", f"{log} cannot be read ({error})")
    except ReplayError as error:
        _fail("hbm replay-decisions", f"{log}: {error}")
    difference = found.difference
    if difference is not None:
        typer.echo(
            f"line {difference.line}: {difference.field} was {difference.recorded!r} and is "
            f"{difference.replayed!r} ({found.decisions} decisions before it are the same)"
        )
        raise typer.Exit(1)
    typer.echo(f"{found.decisions} decisions are the same, bit for bit")


@explain.command("explain")
def run_explain(
    run_dir: Annotated[
        Path, typer.Option(help="Run directory of the sidecar.", envvar="HBM_RUN_DIR")
    ] = Path("/run/hbm"),
    last: Annotated[int, typer.Option(min=1, max=10_000, help="How many decisions.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON array on stdout.")] = False,
) -> None:
    """Why the sidecar took its last decisions, oldest first.

    What each layer added to the newest one goes to stderr, beside the parameters.
    """
    from hbm_sidecar.contributions import block
    from hbm_sidecar.explain import (
        ExplainError,
        fetch_explained,
        human_line,
        policy_line,
        to_json,
    )

    try:
        decisions, policy, prices, residual = fetch_explained(run_dir, last)
    except ExplainError as error:
        _fail("hbm explain", str(error))
    if as_json:
        sys.stdout.write(to_json(decisions) + os.linesep)
        return
    if policy:
        # Beside the decisions, which are for tools that read line by line.
        typer.echo(policy_line(policy), err=True)
    if not decisions:
        typer.echo("no decision yet", err=True)
    for decision in decisions:
        typer.echo(human_line(decision))
    if decisions:
        for line in block(decisions[-1], prices, residual):
            typer.echo(line, err=True)
