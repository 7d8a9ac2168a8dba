"""A study workload as a file: one node, the regimes its traffic goes through, how long each lasts.

Regimes have the vocabulary of the load generator's scenarios (`hbm_load.scenario`). What is added
here is the node with its true costs, a length in requests instead of seconds, and a warm-up.
"""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Final, Literal, NamedTuple

import numpy as np
from hbm_load.model_text import parse_model
from hbm_load.scenario import Name, Regime, blend
from hbm_policy.costs import CostConstants
from hbm_pool.contracts.records import CostModel, RowClass, ServerInfo, TableMap
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hbm_sim.node_spec import NodeSpec

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
SAMPLE_SLOTS: Final = 65_536
"""Slots that a server's hash sample is to have by default (`server.sample_slots`)."""


class WorkloadError(ValueError):
    """A workload file that cannot be used; one line with file, field and value."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Node(_Section):
    """The pool, the model and what a request costs on this node."""

    pool_bytes: int = Field(gt=0)
    extent_bytes: int = Field(2 << 20, gt=0)
    page_tokens: int = Field(32, ge=1)
    token_bytes: int = Field(gt=0)
    """KV of one token, all layers."""
    row_bytes: int = Field(gt=0)
    lookups_per_token: int = Field(ge=1, le=1024)
    """Rows that one history token or candidate looks up (*F*)."""
    max_sequence_tokens: int = Field(16_384, ge=1)
    drop_block_tokens: int = Field(1024, ge=1)
    """A longer history loses whole blocks of this length at its start, and its KV with them."""
    gather: Literal["serial", "overlap"] = "serial"
    fixed_ms: NonNegative = 1.2
    token_us: NonNegative = 0.28
    """Compute per computed token or candidate, µs."""
    token_context_ns: NonNegative = 0.07 / 1024 * 1e3
    """Compute per computed token or candidate and token of its context, ns."""
    context: Literal["causal", "whole"] = "causal"
    """What a computed history token attends to: the tokens up to itself, or (as the standard
    node is defined) the whole history."""
    gather_bytes_per_s: Positive = 3.0e9
    """Effective rate of gathering random missed rows."""
    alpha_min: Share = 0.1
    alpha_max: Share = 0.9
    slo_ms: Positive = 80.0
    queue_limit: int = Field(4096, ge=1)
    """Requests that may wait; a further one is refused."""

    @model_validator(mode="after")
    def _fits(self) -> Node:
        page = self.page_tokens * self.token_bytes
        if self.extent_bytes % page or self.extent_bytes % self.row_bytes:
            raise ValueError(
                f"extent_bytes {self.extent_bytes} must be a multiple of a KV page ({page} bytes) "
                f"and of a row ({self.row_bytes} bytes)"
            )
        if self.pool_bytes < 16 * self.extent_bytes:
            raise ValueError(f"pool_bytes {self.pool_bytes} holds fewer than 16 extents")
        if not self.alpha_min < self.alpha_max:
            raise ValueError(f"alpha_min {self.alpha_min} must be below {self.alpha_max}")
        return self


class Step(_Section):
    """One stretch of the walk. A drift is written as steps of growing `weight`."""

    regime: Name
    requests: int = Field(ge=1, le=50_000_000)
    towards: Name | None = None
    """Another regime; the numbers in force lie `weight` of the way from `regime` to it."""
    weight: Share = 0.0
    label: Name | None = None
    """Name under which results are pooled; default: the regime's, with the weight if any."""

    @property
    def name(self) -> str:
        """The pooled name of this step."""
        if self.label is not None:
            return self.label
        return self.regime if self.towards is None else f"{self.regime}-{self.weight:.2g}"


class Phase(NamedTuple):
    """One stretch of requests under one regime."""

    name: str
    requests: int
    regime: Regime


class Workload(_Section):
    """A whole file. Equal content has an equal `digest`."""

    schema_version: Literal[1]
    name: Name
    description: str = ""
    sources: dict[str, str] = {}
    """Where each parameter comes from, or that it is assumed."""
    rows: int = Field(ge=16, lt=1 << 30)
    """Rows of the embedding table; the shelf of new items is the last of them."""
    sample_rate: float = Field(0.01, gt=0.0, le=1.0)
    """Share of rows that the simulation follows, chosen by hash."""
    unsampled_top: int = Field(1000, ge=0)
    """So many of the most popular rows are left out of the sample: they hit at every α, and one of
    them in a small sample would weigh too much. 0 with `sample_rate: 1`."""
    warm_up: int = Field(4000, ge=0)
    """Requests of the first step's regime before the stream begins; served, never counted."""
    settle_share: float = Field(0.5, ge=0.0, lt=1.0)
    """Leading part of each step in which caches are still on their way: α* is taken over the
    rest."""
    node: Node
    regimes: dict[Name, Regime] = Field(min_length=1)
    walk: tuple[Step, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _references(self) -> Workload:
        known = ", ".join(self.regimes)
        for index, step in enumerate(self.walk):
            for name in (step.regime, step.towards):
                if name is not None and name not in self.regimes:
                    raise ValueError(f"walk.{index}: no regime is called {name!r}; known: {known}")
        for name, regime in self.regimes.items():
            if regime.items.new_items >= self.rows:
                raise ValueError(
                    f"regimes.{name}.items.new_items is {regime.items.new_items}; the table has "
                    f"{self.rows} rows"
                )
        if self.sample_rate * self.rows < 64:
            raise ValueError(
                f"sample_rate {self.sample_rate} leaves {self.sample_rate * self.rows:.0f} of "
                f"{self.rows} rows; at least 64 are needed"
            )
        return self

    def phases(self) -> list[Phase]:
        """The walk, drifts resolved."""
        return [
            Phase(
                step.name,
                step.requests,
                self.regimes[step.regime]
                if step.towards is None
                else blend(self.regimes[step.regime], self.regimes[step.towards], step.weight),
            )
            for step in self.walk
        ]

    @property
    def labels(self) -> tuple[str, ...]:
        """Pooled names in order of first appearance."""
        return tuple(dict.fromkeys(step.name for step in self.walk))

    def digest(self) -> str:
        """SHA-256 over the content; a changed number is another workload."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def with_gather(self, gather: Literal["serial", "overlap"]) -> Workload:
        """The same workload on a node that gathers otherwise."""
        return self.model_copy(
            update={"node": self.node.model_copy(update={"gather": gather})}, deep=False
        )

    def node_spec(self) -> NodeSpec:
        """The node as server and simulator know it."""
        node = self.node
        extents = node.pool_bytes // node.extent_bytes
        info = ServerInfo(
            node="node-0",
            model=self.name,
            extents=extents,
            extent_bytes=node.extent_bytes,
            page_tokens=node.page_tokens,
            pages_per_extent=node.extent_bytes // (node.page_tokens * node.token_bytes),
            max_sequence_tokens=node.max_sequence_tokens,
            drop_block_tokens=node.drop_block_tokens,
            tables=(TableMap("item", self.rows, 0, False),),
            classes=(
                RowClass(node.row_bytes, node.extent_bytes // node.row_bytes, self.rows, (0,)),
            ),
            cost_model=CostModel.OVERLAP if node.gather == "overlap" else CostModel.SERIAL,
            sample_rate=min(1.0, SAMPLE_SLOTS / (node.pool_bytes // node.row_bytes)),
            alpha_min=node.alpha_min,
            alpha_max=node.alpha_max,
            slo_ms=node.slo_ms,
            device="simulated",
        )
        costs = CostConstants(
            node.fixed_ms,
            node.token_us / 1e3,
            node.token_context_ns / 1e6,
            (node.row_bytes / node.gather_bytes_per_s * 1e3,),
        )
        return NodeSpec(
            info=info,
            costs=costs,
            link_bytes_per_s=node.gather_bytes_per_s,
            context=node.context,
            queue_limit=node.queue_limit,
            declared=fitted(costs, self) if node.context == "whole" else None,
        )


def fitted(costs: CostConstants, workload: Workload) -> CostConstants:
    """Causal constants that come nearest to costs charged with the whole history.

    A server fits its constants to what it measures; here least squares over KV hits and misses in
    equal parts, histories at the deciles of the first regime.
    """
    regime = next(iter(workload.regimes.values()))
    deciles = [NormalDist().inv_cdf((k + 0.5) / 10.0) for k in range(10)]
    lengths = regime.history.median * np.exp(regime.history.sigma * np.array(deciles))
    lengths = np.clip(lengths, regime.history.minimum, regime.history.maximum)
    scored, growth = regime.candidates, regime.history.growth
    tokens = np.concatenate([lengths, lengths]) + growth
    new = np.concatenate([np.full(10, growth), lengths + growth])
    causal = new * (2.0 * tokens - new + 1.0) / 2.0 + scored * tokens
    columns = np.stack([new + scored, causal], axis=1)
    takes = costs.token_ms * (new + scored) + costs.token_context_ms * (new + scored) * tokens
    token_ms, token_context_ms = np.linalg.lstsq(columns, takes, rcond=None)[0].tolist()
    return costs._replace(token_ms=max(token_ms, 0.0), token_context_ms=max(token_context_ms, 0.0))


def workloads() -> list[str]:
    """Names that `load_workload` takes besides file paths."""
    folder = files("hbm_sim") / "workloads"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_workload(source: str | Path) -> Workload:
    """Reads a shipped workload by name, or a YAML file. Raises `WorkloadError`."""
    label = str(source)
    if label in workloads():
        text = (files("hbm_sim") / "workloads" / f"{label}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise WorkloadError(
                f"{label}: cannot be read ({reason}); give a YAML file or one of: "
                f"{', '.join(workloads())}"
            ) from error
    return parse_model(
        text,
        label,
        Workload,
        WorkloadError,
        "node, regimes and walk",
        "docs/simulator.md lists them all",
    )
