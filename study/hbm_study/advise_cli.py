"""`hbm advise`: from a log, a model and a GPU to the best α, and whether adapting it would pay."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from hbm_pool.contracts.records import ServerInfo
    from hbm_pool.host.config import PoolConfig

app = typer.Typer(
    name="advise",
    help="From your own log: the best α, and whether adapting it would pay.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def advise(
    trace: Annotated[Path, typer.Option(help="Access log (CSV or Parquet: time, user, items).")],
    model: Annotated[
        str, typer.Option(help="Preset of `hbm plan`, or a file with model, pool and server.")
    ],
    gpu: Annotated[
        str | None, typer.Option(help="a100-40, a100-80, h100-80 or h200-141: sizes the pool.")
    ] = None,
    pool_bytes: Annotated[
        int | None, typer.Option(min=1, help="Size of the pool; goes before --gpu and the file.")
    ] = None,
    columns: Annotated[
        str, typer.Option(help="Columns of the log: time, user and items.")
    ] = "time,user,items",
    candidates: Annotated[int, typer.Option(min=1, help="Items ranked per request.")] = 512,
    parts: Annotated[int, typer.Option(min=1, max=50, help="Parts the log is cut into.")] = 4,
    qps: Annotated[
        float | None,
        typer.Option(min=0.001, help="Requests per second of one node (default: peak 70 % busy)."),
    ] = None,
    slo_ms: Annotated[
        float | None, typer.Option(min=0.001, help="Latency goal, ms (default: the file's).")
    ] = None,
    serial: Annotated[
        bool, typer.Option("--serial/--overlap", help="How gather and compute combine.")
    ] = False,
    fixed_ms: Annotated[float, typer.Option(min=0.0, help="Compute of a request, ms.")] = 1.2,
    token_us: Annotated[
        float, typer.Option(min=0.0, help="Compute per token, µs (assumed: the standard node).")
    ] = 0.28,
    token_context_ns: Annotated[
        float, typer.Option(min=0.0, help="Compute per token and token of context, ns.")
    ] = 0.068,
    gather_bytes_per_s: Annotated[
        float, typer.Option(min=1.0, help="Effective rate of gathering random missed rows.")
    ] = 3.0e9,
    out: Annotated[
        Path, typer.Option(help="Folder of advice.html, policy.yaml and advice.json.")
    ] = Path("out/advise"),
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Simulates every static α and the adapting stack on the log; writes a report and a policy.

    Compute costs are those of the standard node unless given: measure yours with
    `hbm bench serving`, they decide the answer.
    """
    from hbm_load.errors import LoadError
    from hbm_load.reader import LogColumns, read_log
    from hbm_sim.model_file import ModelFileError
    from hbm_sim.trace_stream import stream_of_trace

    from hbm_study.advice_page import page, policy_yaml
    from hbm_study.advise import AdviceError
    from hbm_study.advise import advise as make_advice
    from hbm_study.log_node import Compute, node_of

    names = columns.split(",")
    if len(names) != 3:
        _refuse(f"--columns is {columns!r}; it must name three columns: time,user,items")
    try:
        info, config = _node(model, gpu, pool_bytes, serial)
        read = read_log(
            trace,
            LogColumns(names[0], names[1], names[2]),
            catalogue=info.tables[0].rows,
            candidates=candidates,
            parts=parts,
        )
        compute = Compute(fixed_ms, token_us, token_context_ns, gather_bytes_per_s)
        node = node_of(read.trace, info, config, compute)
        stream = stream_of_trace(read.trace, node.workload)
        spec = node.workload.node_spec()
        goal = slo_ms or info.slo_ms or None
        advice = make_advice(stream, spec, qps=qps, slo_ms=goal)
        plan = _plan(config)
    except (LoadError, ModelFileError, AdviceError, ValueError, OSError) as error:
        _refuse(str(error))
    notes = [f"{read.report.rejected} of {read.report.lines} lines could not be used."]
    if node.rounded:
        width = node.workload.node.row_bytes
        notes.append(f"All tables were simulated with rows of {width} bytes.")
    out.mkdir(parents=True, exist_ok=True)
    described = {**advice.as_dict(), "notes": notes}
    (out / "advice.html").write_text(page(advice, plan, f"{trace.name} on {model}", notes))
    (out / "policy.yaml").write_text(policy_yaml(advice, "rank"))
    (out / "advice.json").write_text(json.dumps(described, indent=2) + "\n")
    if as_json:
        typer.echo(json.dumps(described, indent=2))
        return
    typer.echo(advice.verdict())
    best = advice.best_service
    typer.echo(
        f"Best static α: {advice.recommended:.2f} (within 1 % of mean service time: "
        f"{best.plateau_low:.2f} to {best.plateau_high:.2f})."
    )
    typer.echo(f"Written: {out / 'advice.html'}, {out / 'policy.yaml'}, {out / 'advice.json'}")


def _node(
    model: str, gpu: str | None, pool_bytes: int | None, serial: bool
) -> tuple[ServerInfo, PoolConfig]:
    """The node of a model: the file's or preset's, with the pool of the GPU."""
    import copy
    import dataclasses

    import yaml
    from hbm_pool.cli import PRESETS
    from hbm_pool.contracts.records import CostModel
    from hbm_pool.host.plan import DEFAULT_RESERVE_BYTES, GPU_MEMORY_BYTES
    from hbm_sim.model_file import ModelFileError

    if model in PRESETS:
        raw: Any = copy.deepcopy(PRESETS[model])
    else:
        try:
            raw = yaml.safe_load(Path(model).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            known = ", ".join(PRESETS)
            raise ModelFileError(
                f"{model}: cannot be read; give a file or one of: {known}"
            ) from error
    if not isinstance(raw, dict) or not all(
        isinstance(raw.get(n), dict) for n in ("model", "pool")
    ):
        raise ModelFileError(f"{model}: must be a mapping with the sections model and pool")
    if gpu is not None and gpu not in GPU_MEMORY_BYTES:
        raise ModelFileError(f"--gpu is {gpu!r}; it must be one of: {', '.join(GPU_MEMORY_BYTES)}")
    if pool_bytes is not None:
        raw["pool"]["pool_bytes"] = pool_bytes
    elif gpu is not None:
        raw["pool"]["pool_bytes"] = GPU_MEMORY_BYTES[gpu] - DEFAULT_RESERVE_BYTES
    elif "pool_bytes" not in raw["pool"]:
        raise ModelFileError(f"{model}: no pool_bytes in it; give --gpu or --pool-bytes")
    longest = raw["model"].get("max_sequence_tokens", 0)
    raw["model"].setdefault("drop_block_tokens", max(1, longest // 16))
    info, config = _loaded(raw, model)
    cost_model = CostModel.SERIAL if serial else CostModel.OVERLAP
    return dataclasses.replace(info, cost_model=cost_model), config


def _loaded(raw: dict[str, Any], model: str) -> tuple[ServerInfo, PoolConfig]:
    """Where the file states no upper bound of α: the highest at which batches still fit."""
    import yaml
    from hbm_sim.model_file import ModelFileError, load_node

    highest = [] if "alpha_max" in raw["pool"] else [0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5]
    refused: ModelFileError | None = None
    for alpha_max in [*highest, raw["pool"].get("alpha_max", 0.9)]:
        raw["pool"]["alpha_max"] = alpha_max
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            yaml.safe_dump(raw, file)
            file.flush()
            try:
                return load_node(file.name)
            except ModelFileError as error:
                refused = refused or ModelFileError(str(error).replace(file.name, model))
    assert refused is not None
    raise refused


def _plan(config: PoolConfig) -> Any:
    from hbm_pool.host.plan import plan_memory

    return plan_memory(
        config.kv,
        config.tables,
        config.pool_bytes,
        max_sequence_tokens=config.max_sequence_tokens,
        max_batch_users=config.max_batch_users,
        extent_bytes=config.bytes_per_extent,
    )


def _refuse(message: str) -> NoReturn:
    typer.echo(f"hbm advise: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)
