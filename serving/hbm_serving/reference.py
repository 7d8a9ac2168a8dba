"""The same model without any cache, batch, page or jagged operator: what scores must equal.

Written against the formulas, not against `model.py`: whole sequence, explicit masks, numpy
buckets. Used by the tests and by the demo, which scores a sample of its responses anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from hbm_pool.contracts.history import first_kept_token, table_rows

from hbm_serving.config import Config, ModelConfig
from hbm_serving.weights import draw_dense, draw_table, load_dense, load_table

Ints = npt.NDArray[np.int64]


class ReferenceScorer:
    """Scores one request at a time in `dtype` (float64 shows the rounding of float32)."""

    def __init__(
        self,
        model: ModelConfig,
        dense: Mapping[str, torch.Tensor],
        tables: Mapping[str, torch.Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.tables = dict(tables)
        self.load(dense)

    @classmethod
    def from_config(cls, config: Config, dtype: torch.dtype = torch.float32) -> ReferenceScorer:
        """The weights a server of this configuration starts with."""
        model, path, seed = config.model, config.server.weights, config.server.seed
        dense = draw_dense(model, seed) if path is None else load_dense(model, path)
        tables = {}
        for index, table in enumerate(model.tables):
            rows = None if path is None else load_table(model, index, path)
            tables[table.name] = (
                torch.from_numpy(draw_table(model, index, seed)) if rows is None else rows
            )
        return cls(model, dense, tables, dtype)

    def load(self, dense: Mapping[str, torch.Tensor]) -> None:
        """Takes over other dense weights (a new model version)."""
        self._dense = {name: tensor.to(self.dtype) for name, tensor in dense.items()}

    def push_rows(self, table: str, ids: Ints, values: torch.Tensor) -> None:
        """Overwrites rows, as `POST /v1/admin/rows` does."""
        self.tables[table][torch.from_numpy(ids)] = values.to(self.tables[table].dtype)

    @torch.inference_mode()
    def score(
        self,
        items: Sequence[int] | Ints,
        timestamps: Sequence[int] | Ints,
        candidates: Sequence[int] | Ints,
        actions: Sequence[int] | Ints | None = None,
        query_time: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """Scores of the candidates, `[C] float32`. Arguments as in the body of `/v1/rank`."""
        model = self.model
        start = first_kept_token(len(items), model.max_sequence_tokens, model.drop_block_tokens)
        history = np.asarray(items, dtype=np.int64)[start:]
        times = np.asarray(timestamps, dtype=np.int64)[start:]
        targets = np.asarray(candidates, dtype=np.int64)
        if query_time is None:
            query_time = int(times[-1]) if len(times) else 0
        tokens, count = len(history), len(targets)
        x = self._embed(np.concatenate([history, targets]), actions, start, tokens)
        # Every candidate stands right after the history, at the time of the query.
        positions = np.concatenate([np.arange(tokens), np.full(count, tokens)]).astype(np.int64)
        clock = np.concatenate([times, np.full(count, query_time, dtype=np.int64)])
        mask = np.tril(np.ones((tokens + count, tokens + count), dtype=bool))
        mask[tokens:, tokens:] = np.eye(count, dtype=bool)
        distance = np.maximum(positions[:, None] - positions[None, :], 0)
        position = torch.from_numpy(_position_buckets(distance, model.attention.position_buckets))
        elapsed = torch.from_numpy(
            _time_buckets(clock[:, None] - clock[None, :], model.attention.time_buckets)
        )
        for layer in range(model.layers):
            x = self._block(layer, x, position, elapsed, torch.from_numpy(mask))
        hidden = self._norm(x[tokens:], "head.norm")
        scores = F.linear(hidden, self._dense["head.weight"], self._dense["head.bias"])
        return scores[:, 0].to(torch.float32).numpy()

    def _embed(
        self, items: Ints, actions: Sequence[int] | Ints | None, start: int, tokens: int
    ) -> torch.Tensor:
        x = torch.zeros(len(items), self.model.embedding_dim, dtype=self.dtype)
        for index, table in enumerate(self.model.tables):
            ids = table_rows(items, index, table.rows, hashed=index > 0)
            rows = self.tables[table.name][torch.from_numpy(ids)].to(self.dtype)
            x += rows @ self._dense[f"projection.{table.name}"].T
        if self.model.actions:
            kinds = np.zeros(len(items), dtype=np.int64)
            if actions is not None:
                kinds[:tokens] = np.asarray(actions, dtype=np.int64)[start:] + 1
            x += self._dense["actions"][torch.from_numpy(kinds)]
        return x

    def _block(
        self,
        layer: int,
        x: torch.Tensor,
        position: torch.Tensor,
        elapsed: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        model, dense = self.model, self._dense
        hidden = self._norm(x, f"layers.{layer}.norm")
        uvqk = F.silu(
            F.linear(
                hidden, dense[f"layers.{layer}.uvqk.weight"], dense[f"layers.{layer}.uvqk.bias"]
            )
        )
        u, v, q, k = uvqk.chunk(4, dim=1)
        bias = dense[f"layers.{layer}.position_bias"][position]
        if model.attention.time_bias == "own_timestamps":
            bias = bias + dense[f"layers.{layer}.time_bias"][elapsed]
        heads = []
        for head in range(model.heads):
            part = slice(head * model.head_dim, (head + 1) * model.head_dim)
            weights = F.silu(q[:, part] @ k[:, part].T + bias) * mask
            heads.append(weights @ v[:, part] / model.max_sequence_tokens)
        gated = self._norm(torch.cat(heads, dim=1), f"layers.{layer}.output_norm") * u
        return x + F.linear(
            gated, dense[f"layers.{layer}.output.weight"], dense[f"layers.{layer}.output.bias"]
        )

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(
            x, (x.shape[1],), self._dense[f"{name}.weight"], self._dense[f"{name}.bias"], eps=1e-5
        )


def _half_octaves(value: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """2 * floor(log2 v) + second half of the octave, of the value rounded to float32."""
    mantissa, exponent = np.frexp(value.astype(np.float32))  # v = mantissa * 2^exponent, in [.5, 1)
    return 2 * (exponent.astype(np.int64) - 1) + (mantissa >= 0.75)


def _position_buckets(distance: npt.NDArray[np.int64], buckets: int) -> npt.NDArray[np.int64]:
    far = 2 + _half_octaves(np.maximum(distance, 8))
    return np.minimum(np.where(distance < 8, distance, far), buckets - 1)


def _time_buckets(seconds: npt.NDArray[np.int64], buckets: int) -> npt.NDArray[np.int64]:
    return np.minimum(_half_octaves(np.maximum(seconds, 1)), buckets - 1)


def max_error(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> float:
    """Largest absolute difference of two score vectors; infinite when they differ in kind."""
    if left.shape != right.shape or not (np.isfinite(left).all() and np.isfinite(right).all()):
        return math.inf
    return float(np.abs(left - right).max(initial=0.0))
