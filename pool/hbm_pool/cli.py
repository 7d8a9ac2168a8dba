"""`hbm plan`: what a pool holds, from a model's shape and a GPU, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from hbm_pool.host.plan import MemoryPlan

app = typer.Typer(
    name="plan",
    help="What a pool of a given size holds, before anything starts.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

PRESETS: dict[str, dict[str, Any]] = {
    # Small enough for a laptop; `hbm demo` is of this kind.
    "small": {
        "model": {
            "tables": [
                {"name": "item", "rows": 100_000, "width": 64},
                {"name": "side", "rows": 20_000, "width": 32},
            ],
            "layers": 2,
            "heads": 2,
            "head_dim": 32,
            "dtype": "float32",
            "max_sequence_tokens": 512,
        },
        "pool": {"pool_bytes": 25_165_824, "extent_bytes": 65_536, "page_tokens": 16},
        "server": {"max_batch_requests": 4},
    },
    # NVIDIA recsys-examples, examples/hstu/inference/benchmark: 32 KiB per token.
    "hstu-8x1024": {
        "model": {
            "tables": [
                {"name": "item", "rows": 50_000_000, "width": 128},
                {"name": "user", "rows": 50_000_000, "width": 128},
            ],
            "layers": 8,
            "heads": 4,
            "head_dim": 256,
            "dtype": "bfloat16",
            "max_sequence_tokens": 4096,
        },
        "pool": {"page_tokens": 32},
        "server": {"max_batch_requests": 8},
    },
    # MLPerf DLRMv3 (mlcommons/inference recommendation/dlrm_v3): 10 KiB per token.
    "dlrmv3": {
        "model": {
            "tables": [
                {"name": "item", "rows": 1_000_000_000, "width": 512, "dtype": "float16"},
                {"name": "user", "rows": 10_000_000, "width": 512, "dtype": "float16"},
            ],
            "layers": 5,
            "heads": 4,
            "head_dim": 128,
            "dtype": "bfloat16",
            "max_sequence_tokens": 16_384,
        },
        "pool": {"page_tokens": 32},
        "server": {"max_batch_requests": 10},
    },
}


@app.command()
def plan(
    config: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON file with the sections model, pool and server."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"A known model instead: {', '.join(PRESETS)}.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="a100-40, a100-80, h100-80 or h200-141: sizes the pool.")
    ] = None,
    pool_bytes: Annotated[
        int | None, typer.Option(help="Size of the pool; goes before --gpu and the file.")
    ] = None,
    reserve_bytes: Annotated[
        int | None, typer.Option(help="With --gpu: kept out of the pool (default 6 GiB).")
    ] = None,
    history_tokens: Annotated[
        int | None, typer.Option(help="Length users are counted with (default: the longest).")
    ] = None,
    alpha: Annotated[
        list[float] | None, typer.Option(help="An α to show; may be repeated (default .1 to .9).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Extent size, rows, users and GB for each α of a given model and GPU."""
    from pydantic import ValidationError

    from hbm_pool.host.plan import DEFAULT_ALPHAS, plan_memory

    source, label = _source(config, preset)
    try:
        model = _section(source, "model", label)
        pool = _section(source, "pool", label)
        server = source.get("server") or {}
        result = plan_memory(
            _kv_spec(model, pool, label),
            _table_specs(model, label),
            _pool_bytes(pool, gpu, pool_bytes, reserve_bytes),
            extent_bytes=pool.get("extent_bytes"),
            max_sequence_tokens=_key(model, "model.max_sequence_tokens", label),
            max_batch_users=server.get("max_batch_requests", 8),
            history_tokens=history_tokens,
            alphas=alpha or DEFAULT_ALPHAS,
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        got = "" if problem["type"] == "value_error" else f" (got {problem['input']!r})"
        _refuse(f"{label}: {where + ': ' if where else ''}{message}{got}")
    except (ValueError, TypeError) as error:
        _refuse(f"{label}: {error}")
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        _print(result, label)


def _refuse(message: str) -> NoReturn:
    typer.echo(f"hbm plan: {message}", err=True)
    raise typer.Exit(2)


def _source(config: Path | None, preset: str | None) -> tuple[dict[str, Any], str]:
    if (config is None) == (preset is None):
        _refuse(f"give either --config FILE or --preset, one of: {', '.join(PRESETS)}")
    if preset is not None:
        if preset not in PRESETS:
            _refuse(f"preset {preset!r} is unknown; use one of: {', '.join(PRESETS)}")
        return PRESETS[preset], preset
    assert config is not None
    try:
        text = config.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        _refuse(f"{config}: cannot be read ({reason})")
    raw = _parsed(text, config)
    if not isinstance(raw, dict):
        _refuse(f"{config}: must be a mapping with the sections model, pool and server")
    return raw, str(config)


def _parsed(text: str, path: Path) -> Any:
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            _refuse(f"{path}: not valid JSON: {error}")
    try:
        import yaml
    except ImportError:
        _refuse(f"{path}: reading YAML needs pyyaml; install it, or give a .json file")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        _refuse(f"{path}: not valid YAML: {' '.join(str(error).split())}")


def _section(source: dict[str, Any], name: str, label: str) -> dict[str, Any]:
    section = source.get(name)
    if not isinstance(section, dict):
        _refuse(f"{label}: the section {name!r} is missing or not a mapping")
    return section


def _key(section: dict[str, Any], path: str, label: str) -> Any:
    name = path.rsplit(".", 1)[1]
    if name not in section:
        _refuse(f"{label}: {path}: this key is required")
    return section[name]


def _kv_spec(model: dict[str, Any], pool: dict[str, Any], label: str) -> Any:
    from hbm_pool.host.config import KVSpec

    return KVSpec(
        layers=_key(model, "model.layers", label),
        heads=_key(model, "model.heads", label),
        head_dim=_key(model, "model.head_dim", label),
        page_tokens=_key(pool, "pool.page_tokens", label),
        dtype=model.get("dtype", "float32"),
    )


def _table_specs(model: dict[str, Any], label: str) -> list[Any]:
    from hbm_pool.host.config import TableSpec

    tables = _key(model, "model.tables", label)
    if not isinstance(tables, list) or not tables:
        _refuse(f"{label}: model.tables: must be a list with at least one table")
    return [TableSpec(**table) for table in tables]


def _pool_bytes(
    pool: dict[str, Any], gpu: str | None, pool_bytes: int | None, reserve_bytes: int | None
) -> int:
    from hbm_pool.host.plan import DEFAULT_RESERVE_BYTES, GPU_MEMORY_BYTES

    if pool_bytes is not None:
        return pool_bytes
    if gpu is not None:
        if gpu not in GPU_MEMORY_BYTES:
            raise ValueError(
                f"GPU {gpu!r} is unknown; use one of {', '.join(GPU_MEMORY_BYTES)}, or --pool-bytes"
            )
        reserve = DEFAULT_RESERVE_BYTES if reserve_bytes is None else reserve_bytes
        if not 0 <= reserve < GPU_MEMORY_BYTES[gpu]:
            raise ValueError(
                f"--reserve-bytes={reserve} must be from 0 to below the memory of {gpu} "
                f"({GPU_MEMORY_BYTES[gpu]})"
            )
        return GPU_MEMORY_BYTES[gpu] - reserve
    given = pool.get("pool_bytes")
    if not isinstance(given, int):
        raise ValueError("the pool has no size; give --gpu, --pool-bytes or pool.pool_bytes")
    return given


def _print(plan: MemoryPlan, label: str) -> None:
    import sys

    from rich.console import Console
    from rich.table import Table

    from hbm_pool.host.plan import highest_alpha

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(
        f"[bold]{label}[/bold]: {_size(plan.pool_bytes)} = {plan.num_extents} extents of "
        f"{_size(plan.extent_bytes)} ({plan.unused_bytes} bytes left over)"
    )
    console.print(
        f"KV: {plan.token_bytes} bytes per token, {plan.page_tokens} tokens per page, "
        f"{plan.pages_per_extent} pages = {plan.extent_tokens} tokens per extent; a history of "
        f"{plan.history_tokens} tokens leaves {plan.user_tail:.1%} of its extents empty"
    )
    for kind, padding in zip(plan.classes, plan.row_padding, strict=True):
        console.print(
            f"EMB: rows of {kind.width} x {kind.dtype} take {kind.row_bytes} bytes "
            f"({padding:.1%} padding), {kind.rows_per_extent} per extent"
        )
    table = Table(title="What it holds", title_justify="left")
    for name in ("α", "EMB", "KV"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in plan.alphas[0].rows if plan.alphas else ():
        table.add_column(f"rows of {', '.join(part.tables)}", justify="right")
    table.add_column("KV tokens", justify="right")
    table.add_column(f"users of {plan.history_tokens}", justify="right")
    table.add_column("two batches' pins", justify="right")
    for row in plan.alphas:
        table.add_row(
            f"{row.alpha:.3f}",
            _size(row.emb_bytes),
            _size(row.kv_bytes),
            *(f"{part.rows:,} ({part.coverage:.1%})" for part in row.rows),
            f"{row.kv_tokens:,}",
            f"{row.users:,}",
            "fit" if row.pins_fit else "do not fit",
        )
    console.print(table)
    console.print(
        f"Batches of {plan.max_batch_users} users with {plan.max_sequence_tokens} tokens: "
        f"alpha_max may be at most {highest_alpha(plan):.3f}"
    )


def _size(nbytes: int) -> str:
    if nbytes >= 1 << 30:
        return f"{nbytes / (1 << 30):.2f} GiB"
    if nbytes >= 1 << 20:
        return f"{nbytes / (1 << 20):.2f} MiB"
    return f"{nbytes / (1 << 10):.1f} KiB"
