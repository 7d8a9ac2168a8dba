"""A node as a server's own configuration file describes it, without starting the server."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import yaml
from hbm_policy.costs import CostConstants
from hbm_pool.contracts.records import CostModel, RowClass, ServerInfo, TableMap
from hbm_pool.host.config import KVSpec, PoolConfig, TableSpec
from pydantic import ValidationError

GATHER_BYTES_PER_S: Final = 3.0e9
"""Effective gather of random rows over PCIe where the file names no link (docs/evaluation)."""


class ModelFileError(ValueError):
    """A file that describes no node; one line that names file, field and value."""


def presets() -> list[str]:
    """Names that `load_node` takes besides files: the presets of the reference server."""
    folder = _preset_folder()
    return [] if folder is None else sorted(path.stem for path in folder.glob("*.yaml"))


def load_node(source: str, *, name: str = "node-0") -> tuple[ServerInfo, PoolConfig]:
    """Reads a preset or a file of `hbm serve` (sections model, pool, server).

    Raises `ModelFileError`.
    """
    path = Path(source)
    folder = _preset_folder()
    if folder is not None and source in presets():
        path = folder / f"{source}.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(presets()) or "none installed"
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ModelFileError(
            f"{source}: cannot be read ({reason}); give a YAML file or a preset ({known})"
        ) from error
    except yaml.YAMLError as error:
        raise ModelFileError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ModelFileError(f"{source}: must be a mapping with the sections model and pool")
    model = _section(raw, "model", source)
    pool = _section(raw, "pool", source)
    server = raw.get("server") or {}
    if not isinstance(server, dict):
        raise ModelFileError(f"{source}: server must be a mapping, not {server!r}")
    config = _pool_config(model, pool, server, source)
    return _info(model, pool, server, config, name, source), config


def link_row_ms(config: PoolConfig) -> tuple[float, ...]:
    """Cost of a missed row by class: its bytes over the link."""
    bytes_per_s = config.link_bytes_per_s or GATHER_BYTES_PER_S
    return tuple(each.row_bytes / bytes_per_s * 1e3 for each in config.classes)


def costs_of(
    config: PoolConfig, fixed_ms: float, token_us: float, token_context_ns: float
) -> CostConstants:
    """Constants from the compute's and the link's."""
    return CostConstants(fixed_ms, token_us / 1e3, token_context_ns / 1e6, link_row_ms(config))


def _preset_folder() -> Path | None:
    # Located, not imported: the simulator needs no torch.
    spec = find_spec("hbm_serving")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "presets"
    return folder if folder.is_dir() else None


def _section(raw: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    section = raw.get(name)
    if not isinstance(section, dict):
        raise ModelFileError(f"{source}: the section {name} is missing")
    return section


def _key(section: Mapping[str, Any], path: str, source: str) -> Any:
    key = path.split(".", 1)[1]
    if key not in section:
        raise ModelFileError(f"{source}: {path} is missing")
    return section[key]


def _pool_config(
    model: dict[str, Any], pool: dict[str, Any], server: dict[str, Any], source: str
) -> PoolConfig:
    optional = {
        key: pool[key]
        for key in ("extent_bytes", "alpha", "alpha_min", "alpha_max", "link_bytes_per_s")
        if key in pool
    }
    tables = _key(model, "model.tables", source)
    if not isinstance(tables, list):
        raise ModelFileError(f"{source}: model.tables must be a list, not {tables!r}")
    try:
        return PoolConfig(
            pool_bytes=_key(pool, "pool.pool_bytes", source),
            tables=tuple(TableSpec(**table) for table in tables),
            kv=KVSpec(
                layers=_key(model, "model.layers", source),
                heads=_key(model, "model.heads", source),
                head_dim=_key(model, "model.head_dim", source),
                page_tokens=_key(pool, "pool.page_tokens", source),
                dtype=model.get("dtype", "float32"),
            ),
            max_batch_users=server.get("max_batch_requests", 8),
            max_sequence_tokens=_key(model, "model.max_sequence_tokens", source),
            **optional,
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        got = "" if problem["type"] == "value_error" else f" (got {problem['input']!r})"
        raise ModelFileError(f"{source}: {where + ': ' if where else ''}{message}{got}") from error
    except TypeError as error:
        raise ModelFileError(f"{source}: model.tables: {error}") from error


def _info(
    model: dict[str, Any],
    pool: dict[str, Any],
    server: dict[str, Any],
    config: PoolConfig,
    name: str,
    source: str,
) -> ServerInfo:
    class_of = {table: index for index, each in enumerate(config.classes) for table in each.tables}
    return ServerInfo(
        node=name,
        model=str(model.get("name", "model")),
        extents=config.num_extents,
        extent_bytes=config.bytes_per_extent,
        page_tokens=config.kv.page_tokens,
        pages_per_extent=config.pages_per_extent,
        max_sequence_tokens=config.max_sequence_tokens,
        drop_block_tokens=_key(model, "model.drop_block_tokens", source),
        tables=tuple(
            TableMap(table.name, table.rows, class_of[index], index > 0)
            for index, table in enumerate(config.tables)
        ),
        classes=tuple(
            RowClass(each.row_bytes, each.rows_per_extent, each.catalogue_rows, each.tables)
            for each in config.classes
        ),
        cost_model=CostModel.OVERLAP if server.get("pipeline", True) else CostModel.SERIAL,
        sample_rate=1.0,
        alpha_min=config.alpha_min,
        alpha_max=config.alpha_max,
        slo_ms=float(server.get("slo_ms", 0.0)),
        device="simulated",
        kv_eviction=config.kv_eviction,
    )
