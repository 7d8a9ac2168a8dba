"""What is served and how: one YAML file, checked before anything starts.

A file has the sections `model`, `pool` and `server`; presets lie in `presets/`. Unknown keys are
errors. A model whose cached KV could differ from recomputed KV is refused (`check_reuse_safe`).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hbm_serving.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
Alpha = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class AttentionKernel(StrEnum):
    """How a layer reads cached KV; `attention.KERNELS` says where each one runs."""

    AUTO = "auto"
    """The fastest one this device supports."""
    GATHER = "gather"
    """Pages are gathered into contiguous K and V, then padded groups are multiplied."""
    REFERENCE = "reference"
    """Request by request with explicit masks: slow, for comparison."""


class AttentionConfig(_Section):
    """How attention is normalised and biased. Only reuse-safe values are served."""

    kernel: AttentionKernel = AttentionKernel.AUTO
    normalisation: Literal["max_sequence", "present_length"] = "max_sequence"
    """`max_sequence` divides by the constant `max_sequence_tokens`."""
    time_bias: Literal["own_timestamps", "next_timestamp", "none"] = "own_timestamps"
    """`own_timestamps` buckets t_i - t_j; `next_timestamp` would need t_{i+1} of a cached token."""
    positions: Literal["from_start", "from_end"] = "from_start"
    query_time: Literal["candidates", "all_tokens"] = "candidates"
    commit_candidates: bool = False
    position_buckets: int = Field(24, ge=2, le=256)
    time_buckets: int = Field(64, ge=2, le=256)

    def unsafe(self) -> list[str]:
        """Why cached KV of this configuration would be wrong; empty when it is reuse-safe."""
        reasons = []
        if self.normalisation == "present_length":
            reasons.append(
                "attention.normalisation=present_length rescales every cached token when the "
                "history grows; use max_sequence"
            )
        if self.time_bias == "next_timestamp":
            reasons.append(
                "attention.time_bias=next_timestamp needs the following token's time, which the "
                "last cached token did not have; use own_timestamps"
            )
        if self.positions == "from_end":
            reasons.append(
                "attention.positions=from_end renumbers every cached token when the history "
                "grows; use from_start"
            )
        if self.query_time == "all_tokens":
            reasons.append(
                "attention.query_time=all_tokens makes cached tokens depend on the request; "
                "use candidates"
            )
        if self.commit_candidates:
            reasons.append(
                "attention.commit_candidates=true would put candidates into the user's history; "
                "use false"
            )
        return reasons


class TableConfig(_Section):
    """One embedding table: the first holds one row per item, the others are hashed features."""

    name: Name
    rows: int = Field(ge=1, lt=1 << 40)
    width: int = Field(ge=1, le=8192)
    dtype: Dtype = "float32"
    file: Path | None = None
    """Rows in a file larger than memory (`hbm_pool.host.file_store`); None: weights or seed."""


class ModelConfig(_Section):
    """Shape of the HSTU model. Widths are in elements, lengths in tokens."""

    name: Name = "hstu"
    tables: tuple[TableConfig, ...] = Field(min_length=1, max_length=16)
    embedding_dim: int = Field(ge=1, le=8192)
    layers: int = Field(ge=1, le=64)
    heads: int = Field(ge=1, le=64)
    head_dim: int = Field(ge=1, le=512)
    dtype: Dtype = "float32"
    actions: int = Field(0, ge=0, le=4096)
    """Number of action kinds; 0: the model takes none."""
    max_sequence_tokens: int = Field(ge=1, le=1 << 20)
    """Longest history that is computed; of a longer one whole blocks are dropped at the start."""
    drop_block_tokens: int = Field(ge=1, le=1 << 20)
    max_request_history_tokens: int = Field(ge=1, le=1 << 22)
    """A longer history in a request is refused with 422."""
    max_candidates: int = Field(ge=1, le=1 << 16)
    attention: AttentionConfig = AttentionConfig()

    @model_validator(mode="after")
    def _lengths(self) -> ModelConfig:
        if self.max_request_history_tokens < self.max_sequence_tokens:
            raise ValueError(
                f"max_request_history_tokens={self.max_request_history_tokens} is below "
                f"max_sequence_tokens={self.max_sequence_tokens}; make it at least that"
            )
        if self.drop_block_tokens > self.max_sequence_tokens:
            raise ValueError(
                f"drop_block_tokens={self.drop_block_tokens} exceeds max_sequence_tokens="
                f"{self.max_sequence_tokens}; a dropped block must leave some history"
            )
        names = [table.name for table in self.tables]
        if len(set(names)) != len(names):
            raise ValueError(f"tables have duplicate names: {names}")
        reasons = self.attention.unsafe()
        if reasons:
            raise ValueError("not safe to reuse KV: " + "; ".join(reasons))
        return self

    @property
    def items(self) -> int:
        """Number of item ids: rows of the first table."""
        return self.tables[0].rows


class PoolSection(_Section):
    """The pool and what stands between it and the host. Sizes in bytes."""

    pool_bytes: int = Field(ge=1)
    extent_bytes: int | None = Field(None, ge=1)
    """None: chosen by `plan_memory`."""
    page_tokens: int = Field(ge=1, le=4096)
    alpha: Alpha = 0.5
    alpha_min: Alpha = 0.1
    alpha_max: Alpha = 0.9
    link_bytes_per_s: float | None = Field(None, gt=0.0, allow_inf_nan=False)
    """Makes host-to-device copies cost what they cost on this link; None: what they cost here."""
    refill_bytes_per_s: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    """Budget of the refiller until a sidecar says otherwise; 0: none."""
    max_kv_row_lag_s: float = Field(300.0, ge=0.0, allow_inf_nan=False)
    """How long KV computed from older row values may be reused after rows were pushed; 0: never."""

    @model_validator(mode="after")
    def _bounds(self) -> PoolSection:
        if not self.alpha_min <= self.alpha <= self.alpha_max:
            raise ValueError(
                f"alpha_min={self.alpha_min} <= alpha={self.alpha} <= alpha_max="
                f"{self.alpha_max} does not hold; change one of them"
            )
        return self


class ServerSection(_Section):
    """Batching, limits and timeouts."""

    max_batch_requests: int = Field(8, ge=1, le=1024)
    max_batch_tokens: int = Field(4096, ge=1)
    """A batch closes when its computed tokens (bounded before the KV lookup) reach this."""
    batch_wait_ms: float = Field(0.0, ge=0.0, le=1000.0, allow_inf_nan=False)
    """How long the oldest request of an unfilled batch waits for company."""
    max_queue: int = Field(128, ge=1, le=1 << 16)
    default_deadline_ms: float = Field(10_000.0, gt=0.0, allow_inf_nan=False)
    """A request without a deadline header that waited this long is refused."""
    slo_ms: float = Field(50.0, gt=0.0, allow_inf_nan=False)
    max_body_bytes: int = Field(1 << 20, ge=1024)
    body_timeout_s: float = Field(5.0, gt=0.0, allow_inf_nan=False)
    keep_alive_s: float = Field(30.0, gt=0.0, allow_inf_nan=False)
    max_connections: int = Field(2048, ge=1)
    drain_delay_s: float = Field(0.0, ge=0.0, le=600.0, allow_inf_nan=False)
    """After SIGTERM: how long requests are still accepted while /readyz already says no."""
    drain_s: float = Field(30.0, gt=0.0, le=600.0, allow_inf_nan=False)
    """How long requests in flight may take to finish after that."""
    pipeline: bool = True
    """Gather rows of the next batch while this one computes."""
    cache: bool = True
    """False: no pool; every row and the whole history of every request are fetched and computed."""
    torch_threads: int = Field(1, ge=1, le=256)
    calibrate_s: float = Field(1.0, ge=0.0, le=10.0, allow_inf_nan=False)
    """Time spent at start on measuring the cost constants (0: only from served batches)."""
    sample_slots: int = Field(65_536, ge=1)
    """Rows are sampled for the sidecar's twin so densely that about this many slots are sampled."""
    emb_shards: int = Field(256, ge=1, le=1 << 14)
    """Shards in which the digest states how many rows are resident."""
    top_shards: int = Field(0, ge=0, le=64)
    """How many of a user's most used shards a response names (`X-HBM-Top-Shards`); 0: none. For
    the router's `weighted` policy."""
    seed: int = Field(1, ge=0, lt=1 << 32)
    weights: Path | None = None
    """A safetensors file; None: weights are drawn from `seed`."""


class Config(_Section):
    """Everything `hbm serve` reads."""

    model: ModelConfig
    pool: PoolSection
    server: ServerSection = ServerSection()

    @model_validator(mode="after")
    def _pages(self) -> Config:
        if self.model.max_sequence_tokens % self.pool.page_tokens:
            raise ValueError(
                f"pool.page_tokens={self.pool.page_tokens} does not divide "
                f"model.max_sequence_tokens={self.model.max_sequence_tokens}"
            )
        if self.model.drop_block_tokens % self.pool.page_tokens:
            raise ValueError(
                f"pool.page_tokens={self.pool.page_tokens} does not divide "
                f"model.drop_block_tokens={self.model.drop_block_tokens}"
            )
        return self


def presets() -> list[str]:
    """Names that `load_config` takes besides file paths."""
    folder = files("hbm_serving") / "presets"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(source: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads a preset by name or a YAML file; `overrides` maps `section.key` to a value.

    Raises `ConfigError` with one line that names the file, the field and the value.
    """
    text, label = _read(source)
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{label}: not valid YAML: {reason}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{label}: must be a mapping with the sections model, pool and server")
    for path, value in (overrides or {}).items():
        section, key = path.split(".", 1)
        target = raw.setdefault(section, {})
        if isinstance(target, dict):
            target[key] = value
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{label}: {first_problem(error)}") from error


def first_problem(error: ValidationError) -> str:
    """The first entry of a pydantic error on one line: field, what is wrong, the value."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if problem["type"] == "missing":
        return f"{where}: this key is required"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key"
    value = repr(problem["input"])
    return f"{where}: {message} (got {value if len(value) <= 80 else value[:77] + '...'})"


def _read(source: str | Path) -> tuple[str, str]:
    if str(source) in presets():
        return (files("hbm_serving") / "presets" / f"{source}.yaml").read_text(), str(source)
    path = Path(source)
    try:
        return path.read_text(), str(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(
            f"{path}: cannot be read ({reason}); give a YAML file or one of: {', '.join(presets())}"
        ) from error
