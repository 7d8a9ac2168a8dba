"""HSTU blocks over the uncached part of histories and the candidates.

A block (Zhai et al., ICML 2024, arXiv:2402.17152, section 3): `u, v, q, k = silu(W norm(x))`,
pointwise attention, `x + W_o (norm(attention) * u)`. In the last block history tokens matter
only through their K and V, so their queries are not computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from hbm_serving.attention import (
    MASKED,
    AttentionShape,
    GroupIndex,
    Heads,
    index_groups,
    select_kernel,
)
from hbm_serving.config import ModelConfig
from hbm_serving.features import Batch, BiasIndex
from hbm_serving.weights import DTYPES

NORM_EPSILON = 1e-5


class PagedHistory(NamedTuple):
    """Where a batch's KV lies in the pool. Pages are numbered as in `KVCache.layer_pages`."""

    layer_pages: Sequence[torch.Tensor]  # per layer [num_pages, 2, page_tokens, heads, head_dim]
    page_ids: Sequence[npt.NDArray[np.int64] | None]
    """Per request in batch order: pages of its whole history; None: computed without pages."""


class _Pages(NamedTuple):
    """Index tensors of a batch's page traffic, the same for every layer."""

    layer_pages: Sequence[torch.Tensor]
    page_tokens: int
    read: torch.Tensor | None  # [n] pages whose tokens are all reused
    order: torch.Tensor | None  # history order out of [reused tokens | new tokens]
    write: torch.Tensor | None  # [m] pages that this batch fills
    source: torch.Tensor | slice | None  # new tokens that fill them


class _Layer(NamedTuple):
    norm: tuple[torch.Tensor, torch.Tensor]
    vkuq: tuple[torch.Tensor, torch.Tensor]
    bias: torch.Tensor  # [entries]: position and time bias of every bucket pair, MASKED last
    output_norm: tuple[torch.Tensor, torch.Tensor]
    output: tuple[torch.Tensor, torch.Tensor]


class HSTU:
    """The model of one weights version, ready to score batches. Not thread-safe."""

    def __init__(
        self, model: ModelConfig, dense: Mapping[str, torch.Tensor], device: torch.device
    ) -> None:
        self.model = model
        self.device = device
        self.dtype = DTYPES[model.dtype]
        self.kernel_name, self._kernel = select_kernel(model, device)
        self._merged = model.heads * model.head_dim
        self._shape = AttentionShape(model.heads, model.head_dim, 1.0 / model.max_sequence_tokens)
        self._bias_index = BiasIndex(model, device)
        self.padding_waste = 0.25 if device.type == "cpu" else 4.0

        def place(name: str) -> torch.Tensor:
            return dense[name].to(device=device, dtype=self.dtype).contiguous()

        self._projections = {
            table.name: place(f"projection.{table.name}") for table in model.tables
        }
        self._actions = place("actions") if model.actions else None
        self._layers = [self._load_layer(dense, layer) for layer in range(model.layers)]
        self._head_norm = place("head.norm.weight"), place("head.norm.bias")
        self._head = place("head.weight"), place("head.bias")

    def _load_layer(self, dense: Mapping[str, torch.Tensor], layer: int) -> _Layer:
        def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            return self._own(dense[f"{name}.weight"]), self._own(dense[f"{name}.bias"])

        prefix = f"layers.{layer}"
        # Files hold u, v, q, k; K and V come first here so that both halves are slices.
        weight, bias = dense[f"{prefix}.uvqk.weight"], dense[f"{prefix}.uvqk.bias"]
        u, v, q, k = (slice(i * self._merged, (i + 1) * self._merged) for i in range(4))
        vkuq = (
            self._own(torch.cat([weight[part] for part in (v, k, u, q)])),
            self._own(torch.cat([bias[part] for part in (v, k, u, q)])),
        )
        time = dense[f"{prefix}.time_bias"]
        if self.model.attention.time_bias == "none":
            time = torch.zeros_like(time)
        table = dense[f"{prefix}.position_bias"][:, None] + time[None, :]
        future = torch.full((1, len(time)), MASKED)
        return _Layer(
            pair(f"{prefix}.norm"),
            vkuq,
            self._own(torch.cat([table, future]).view(-1)),
            pair(f"{prefix}.output_norm"),
            pair(f"{prefix}.output"),
        )

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self.device, dtype=self.dtype).contiguous()

    @torch.inference_mode()
    def score(
        self, batch: Batch, rows: Mapping[str, torch.Tensor], history: PagedHistory | None
    ) -> torch.Tensor:
        """Scores of all candidates in batch order, `[candidates] float32` on the host.

        `rows[table]` is `[computed_tokens, width]`: the rows of `batch.item_ids()`. KV of new
        whole pages is written to `history`'s pages; candidates never are.
        """
        groups = index_groups(batch, self._bias_index, self.device)
        pages = self._index_pages(batch, history)
        x = self._embed(batch, rows)
        for number, layer in enumerate(self._layers):
            last = number == len(self._layers) - 1
            x = self._block(number, layer, x, batch, groups, pages, last)
        hidden = F.layer_norm(x, (x.shape[1],), *self._head_norm, eps=NORM_EPSILON)
        return F.linear(hidden, *self._head)[:, 0].to(device="cpu", dtype=torch.float32)

    def _embed(self, batch: Batch, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        parts = [
            F.linear(rows[name].to(self.dtype), weight)
            for name, weight in self._projections.items()
        ]
        x = parts[0]
        for part in parts[1:]:
            x = x + part
        if self._actions is not None:
            index = torch.from_numpy(batch.action_rows()).to(self.device)
            x = x + self._actions.index_select(0, index)
        return x

    def _block(
        self,
        number: int,
        layer: _Layer,
        x: torch.Tensor,
        batch: Batch,
        groups: list[GroupIndex],
        pages: _Pages | None,
        last: bool,
    ) -> torch.Tensor:
        """One block; the last one returns candidates only. New tokens come first in `x`."""
        new, merged = batch.new_tokens, self._merged
        hidden = F.layer_norm(x, (x.shape[1],), *layer.norm, eps=NORM_EPSILON)
        weight, bias = layer.vkuq
        if last:
            vk = F.silu(F.linear(hidden, weight[: 2 * merged], bias[: 2 * merged]))
            uq = F.silu(F.linear(hidden[new:], weight[2 * merged :], bias[2 * merged :]))
            u, q_new, q_candidates = uq[:, :merged], None, uq[:, merged:]
            x = x[new:]
        else:
            vkuq = F.silu(F.linear(hidden, weight, bias))
            vk, u = vkuq[:, : 2 * merged], vkuq[:, 2 * merged : 3 * merged]
            q_new, q_candidates = vkuq[:new, 3 * merged :], vkuq[new:, 3 * merged :]
        v, k = vk[:, :merged], vk[:, merged:]
        k_history, v_history = self._join_history(number, k[:new], v[:new], pages)
        heads = Heads(q_new, q_candidates, k_history, v_history, k[new:], v[new:])
        attended_new, attended = self._kernel(self._shape, batch, groups, heads, layer.bias)
        if attended_new is not None:
            attended = torch.cat([attended_new, attended])
        gated = F.layer_norm(attended, (merged,), *layer.output_norm, eps=NORM_EPSILON) * u
        return x + F.linear(gated, *layer.output)

    # -- pages -----------------------------------------------------------------------------

    def _index_pages(self, batch: Batch, history: PagedHistory | None) -> _Pages | None:
        if history is None:
            return None
        size = history.layer_pages[0].shape[2]
        read, write, order, source = [], [], [], []
        reused_at, reused = 0, sum(span.cached for span in batch.spans)
        for span, page_ids in zip(batch.spans, history.page_ids, strict=True):
            order.append(np.arange(reused_at, reused_at + span.cached))
            order.append(np.arange(span.new_at, span.new_at + span.new) + reused)
            reused_at += span.cached
            if page_ids is None:
                continue
            first, whole = span.cached // size, span.tokens // size
            read.append(page_ids[:first])
            write.append(page_ids[first:whole])
            source.append(np.arange(span.new_at, span.new_at + (whole - first) * size))
        return _Pages(
            history.layer_pages,
            size,
            self._index(read) if reused else None,
            # One request, or nothing reused: the tokens stand in order already.
            self._index(order) if reused and len(batch.spans) > 1 else None,
            self._index(write),
            self._index(source),
        )

    def _index(self, parts: list[npt.NDArray[np.int64]]) -> torch.Tensor | None:
        joined = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        if not len(joined):
            return None
        return torch.from_numpy(joined.astype(np.int64, copy=False)).to(self.device)

    def _join_history(
        self, number: int, k: torch.Tensor, v: torch.Tensor, pages: _Pages | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of whole histories `[history_tokens, H * d]`; fills the batch's new pages."""
        if pages is None:
            return k, v
        layer = pages.layer_pages[number]
        shape = (-1, pages.page_tokens, self.model.heads, self.model.head_dim)
        if pages.write is not None and isinstance(pages.source, torch.Tensor):
            for side, new in enumerate((k, v)):
                filled = new.index_select(0, pages.source).view(shape).to(layer.dtype)
                layer[:, side].index_copy_(0, pages.write, filled)
        if pages.read is None:
            return k, v
        reused = layer.index_select(0, pages.read)
        joined = []
        for side, new in enumerate((k, v)):
            old = reused[:, side].reshape(-1, self._merged).to(self.dtype)
            whole = torch.cat([old, new])
            joined.append(whole if pages.order is None else whole.index_select(0, pages.order))
        return joined[0], joined[1]
