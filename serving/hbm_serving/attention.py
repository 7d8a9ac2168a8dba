"""HSTU attention over a history that is partly cached: one contract, several kernels.

For query i and key j: `out_i = sum_j silu(q_i . k_j + bias_ij) v_j / max_sequence_tokens`
(Zhai et al., ICML 2024, arXiv:2402.17152, eq. 3; no softmax). New history tokens attend to the
history up to themselves; a candidate attends to the whole history and to itself.

A kernel that reads pages in place is a further entry of `KERNELS`: it states where it runs, and
`select_kernel` refuses it elsewhere. It is never replaced silently (FBGEMM's HSTU wrapper drops
`kv_cache` on sm90 without an error).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import torch
import torch.nn.functional as F

from hbm_serving.config import AttentionKernel, ModelConfig
from hbm_serving.errors import ConfigError
from hbm_serving.features import Batch, BiasIndex

MASKED = -1.0e4
"""Bias of a pair that must not attend: silu of it is an exact zero in float32 and bfloat16."""


class GroupIndex(NamedTuple):
    """Index tensors of requests that are padded together."""

    first: int  # requests [first, last) of the batch
    last: int
    new: int  # widths after padding
    tokens: int
    candidates: int
    new_offsets: torch.Tensor  # [G + 1] int64, from the group's first token
    history_offsets: torch.Tensor
    candidate_offsets: torch.Tensor
    history_bias: torch.Tensor | None  # [G, new, tokens] int32 into the bias table
    candidate_bias: torch.Tensor  # [G, 1, tokens] int32


class Heads(NamedTuple):
    """Projections of one layer. Histories `[tokens, H * d]`, queries None where not needed."""

    q_new: torch.Tensor | None
    q_candidates: torch.Tensor
    k_history: torch.Tensor
    v_history: torch.Tensor
    k_candidates: torch.Tensor
    v_candidates: torch.Tensor


class AttentionShape(NamedTuple):
    heads: int
    head_dim: int
    scale: float  # 1 / max_sequence_tokens


Kernel = Callable[
    [AttentionShape, Batch, list[GroupIndex], Heads, torch.Tensor],
    tuple[torch.Tensor | None, torch.Tensor],
]


def index_groups(batch: Batch, bias: BiasIndex, device: torch.device) -> list[GroupIndex]:
    """Index tensors of every padded group, made once per batch and used by every layer."""
    groups = []
    for first, last in batch.groups:
        spans = batch.spans[first:last]
        requests = batch.requests[first:last]
        lengths = torch.tensor(
            [
                [span.new for span in spans],
                [span.tokens for span in spans],
                [span.candidates for span in spans],
                [span.cached for span in spans],
                [request.query_time for request in requests],
            ],
            dtype=torch.int64,
        ).to(device)
        times = [torch.from_numpy(request.timestamps) for request in requests]
        tokens = max(span.tokens for span in spans)
        history_offsets = _offsets(lengths[1])
        if len(times) == 1:
            padded = times[0].to(device)[None]
        else:
            padded = torch.ops.fbgemm.jagged_to_padded_dense(
                torch.cat(times).to(device)[:, None], [history_offsets], [tokens], 0
            )[:, :, 0]
        new = max(span.new for span in spans)
        groups.append(
            GroupIndex(
                first,
                last,
                new,
                tokens,
                max(span.candidates for span in spans),
                _offsets(lengths[0]),
                history_offsets,
                _offsets(lengths[2]),
                bias.history(padded, lengths[3], new) if new else None,
                bias.candidates(padded, lengths[1], lengths[4]),
            )
        )
    return groups


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    offsets: torch.Tensor = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
    return offsets


def _own(shape: AttentionShape, heads: Heads, own_bias: torch.Tensor) -> torch.Tensor:
    """A candidate's attention to itself, `[candidates, H * d]` before scaling."""
    split = (-1, shape.heads, shape.head_dim)
    score = (heads.q_candidates * heads.k_candidates).view(split).sum(-1) + own_bias
    own = F.silu(score)[:, :, None] * heads.v_candidates.reshape(split)
    return own.view(-1, shape.heads * shape.head_dim)


def _pad(
    values: torch.Tensor, offsets: torch.Tensor, width: int, requests: int, shape: AttentionShape
) -> torch.Tensor:
    """Jagged `[n, H * d]` -> `[G * H, width, d]`; one request needs no copy."""
    if requests == 1:
        return values.view(width, shape.heads, shape.head_dim).transpose(0, 1)
    dense = torch.ops.fbgemm.jagged_to_padded_dense(values.contiguous(), [offsets], [width], 0.0)
    dense = dense.view(requests, width, shape.heads, shape.head_dim).transpose(1, 2)
    flat: torch.Tensor = dense.reshape(requests * shape.heads, width, shape.head_dim)
    return flat


def _unpad(
    values: torch.Tensor, offsets: torch.Tensor, requests: int, total: int, shape: AttentionShape
) -> torch.Tensor:
    """`[G * H, width, d]` -> jagged `[n, H * d]`."""
    width = values.shape[1]
    merged = shape.heads * shape.head_dim
    if requests == 1:
        return values.transpose(0, 1).reshape(width, merged)
    dense = values.view(requests, shape.heads, width, shape.head_dim).transpose(1, 2)
    jagged: torch.Tensor = torch.ops.fbgemm.dense_to_jagged(
        dense.reshape(requests, width, merged), [offsets], total
    )[0]
    return jagged


def _weigh(
    shape: AttentionShape,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """`[G * H, n, d]` queries over `[G * H, T, d]`; bias `[G, n or 1, T]` for all heads."""
    requests = bias.shape[0]
    rows, tokens = queries.shape[1], keys.shape[1]
    spread = bias[:, None].expand(requests, shape.heads, rows, tokens)
    scores = torch.baddbmm(
        spread.reshape(requests * shape.heads, rows, tokens), queries, keys.transpose(1, 2)
    )
    return torch.bmm(F.silu(scores, inplace=True), values)


def gather_kernel(
    shape: AttentionShape,
    batch: Batch,
    groups: list[GroupIndex],
    heads: Heads,
    bias: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Padded groups over contiguous K and V. `bias` `[entries]` is this layer's table.

    Returns the outputs of new history tokens (None where `q_new` is) and of candidates.
    """
    new_outputs: list[torch.Tensor] = []
    candidate_outputs: list[torch.Tensor] = []
    for group in groups:
        start, end = batch.spans[group.first], batch.spans[group.last - 1]
        requests = group.last - group.first
        history = slice(start.history_at, end.history_at + end.tokens)
        keys = _pad(heads.k_history[history], group.history_offsets, group.tokens, requests, shape)
        values = _pad(
            heads.v_history[history], group.history_offsets, group.tokens, requests, shape
        )
        if heads.q_new is not None and group.history_bias is not None:
            total = end.new_at + end.new - start.new_at
            rows = heads.q_new[start.new_at : end.new_at + end.new]
            queries = _pad(rows, group.new_offsets, group.new, requests, shape)
            out = _weigh(shape, queries, keys, values, _look_up(bias, group.history_bias))
            new_outputs.append(_unpad(out, group.new_offsets, requests, total, shape))
        total = end.candidates_at + end.candidates - start.candidates_at
        rows = heads.q_candidates[start.candidates_at : end.candidates_at + end.candidates]
        queries = _pad(rows, group.candidate_offsets, group.candidates, requests, shape)
        out = _weigh(shape, queries, keys, values, _look_up(bias, group.candidate_bias))
        candidate_outputs.append(_unpad(out, group.candidate_offsets, requests, total, shape))
    candidates = (_joined(candidate_outputs) + _own(shape, heads, bias[0])) * shape.scale
    if heads.q_new is None:
        return None, candidates
    if not new_outputs:
        return heads.q_new, candidates  # no new tokens at all: an empty tensor either way
    return _joined(new_outputs) * shape.scale, candidates


def _look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, index.view(-1)).view(index.shape)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def reference_kernel(
    shape: AttentionShape,
    batch: Batch,
    groups: list[GroupIndex],
    heads: Heads,
    bias: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The same, request by request with einsum and an explicit causal mask."""
    new_outputs, candidate_outputs = [], []
    for group in groups:
        for place, index in enumerate(range(group.first, group.last)):
            span = batch.spans[index]
            history = slice(span.history_at, span.history_at + span.tokens)
            keys, values = heads.k_history[history], heads.v_history[history]
            if heads.q_new is not None and group.history_bias is not None and span.new:
                rows = heads.q_new[span.new_at : span.new_at + span.new]
                entries = group.history_bias[place, : span.new, : span.tokens]
                mask = torch.ones(span.tokens, span.tokens, device=rows.device).tril()
                new_outputs.append(
                    _weigh_one(shape, rows, keys, values, bias[entries.long()], mask[span.cached :])
                )
            rows = heads.q_candidates[span.candidates_at : span.candidates_at + span.candidates]
            entries = group.candidate_bias[place, :, : span.tokens]
            candidate_outputs.append(
                _weigh_one(shape, rows, keys, values, bias[entries.long()], None)
            )
    candidates = (_joined(candidate_outputs) + _own(shape, heads, bias[0])) * shape.scale
    if heads.q_new is None:
        return None, candidates
    if not new_outputs:
        return heads.q_new, candidates
    return _joined(new_outputs) * shape.scale, candidates


def _weigh_one(
    shape: AttentionShape,
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    split = (-1, shape.heads, shape.head_dim)
    scores = torch.einsum("nhd,thd->hnt", rows.reshape(split), keys.reshape(split)) + bias
    weights = F.silu(scores)
    if mask is not None:
        weights = weights * mask.to(weights.dtype)
    out = torch.einsum("hnt,thd->nhd", weights, values.reshape(split))
    return out.reshape(len(rows), shape.heads * shape.head_dim)


class KernelEntry(NamedTuple):
    run: Kernel
    unsupported: Callable[[ModelConfig, torch.device], str | None]
    """Why this kernel cannot run this model on this device; None when it can."""


def _anywhere(model: ModelConfig, device: torch.device) -> str | None:
    return None


KERNELS: dict[AttentionKernel, KernelEntry] = {
    AttentionKernel.GATHER: KernelEntry(gather_kernel, _anywhere),
    AttentionKernel.REFERENCE: KernelEntry(reference_kernel, _anywhere),
}
"""In order of preference for `AttentionKernel.AUTO`."""


def select_kernel(model: ModelConfig, device: torch.device) -> tuple[AttentionKernel, Kernel]:
    """The kernel to run; a named one that cannot run here raises `ConfigError`."""
    wanted = model.attention.kernel
    if wanted is not AttentionKernel.AUTO:
        reason = KERNELS[wanted].unsupported(model, device)
        if reason is not None:
            raise ConfigError(f"model.attention.kernel={wanted}: {reason}")
        return wanted, KERNELS[wanted].run
    for name, entry in KERNELS.items():
        if entry.unsupported(model, device) is None:
            return name, entry.run
    raise ConfigError(f"no attention kernel runs this model on {device}")
