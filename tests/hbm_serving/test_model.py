"""Incremental scoring over pages equals the cache-free reference, whatever is reused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hbm_serving.attention import KERNELS
from hbm_serving.config import AttentionKernel, Config
from hbm_serving.features import Batch, RankRequest, position_bucket, table_ids, time_bucket
from hbm_serving.model import HSTU, PagedHistory
from hbm_serving.reference import ReferenceScorer, max_error
from hbm_serving.weights import draw_dense
from hypothesis import given, settings
from hypothesis import strategies as st

TOLERANCE = 1e-5
Draw = Callable[..., RankRequest]
Scores = Callable[[RankRequest], np.ndarray]


class Pages:
    """Page storage as the pool gives it: strided views per layer, scattered page ids."""

    def __init__(self, config: Config, seed: int, dtype: torch.dtype = torch.float32) -> None:
        model, size = config.model, config.pool.page_tokens
        shape = (256, model.layers, 2, size, model.heads, model.head_dim)
        self.storage = torch.full(shape, float("nan"), dtype=dtype)  # reading a hole shows
        self.layers = [self.storage[:, layer] for layer in range(model.layers)]
        self.size = size
        self._free = list(np.random.default_rng(seed).permutation(256))

    def take(self, tokens: int) -> np.ndarray:
        count = -(-tokens // self.size)
        taken, self._free = self._free[:count], self._free[count:]
        return np.array(taken, dtype=np.int64)


def run(
    model: HSTU,
    reference: ReferenceScorer,
    requests: list[RankRequest],
    cached: list[int],
    pages: Pages | None,
    ids: list[np.ndarray | None],
    waste: float = 0.25,
) -> list[np.ndarray]:
    batch = Batch(requests, cached, padding_waste=waste)
    rows = {
        name: reference.tables[name][torch.from_numpy(wanted)]
        for name, wanted in table_ids(model.model, batch.item_ids()).items()
    }
    history = None if pages is None else PagedHistory(pages.layers, [ids[i] for i in batch.order])
    scores = model.score(batch, rows, history).numpy()
    out: list[np.ndarray] = [np.empty(0)] * len(requests)
    for index, span in zip(batch.order, batch.spans, strict=True):
        out[index] = scores[span.candidates_at : span.candidates_at + span.candidates]
    return out


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_any_mix_of_reused_and_new_tokens_scores_alike(
    config: Config,
    reference: ReferenceScorer,
    draw: Draw,
    wanted: Scores,
    kernel: AttentionKernel,
    data: st.DataObject,
) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shape = config.model.model_copy(
        update={"attention": config.model.attention.model_copy(update={"kernel": kernel})}
    )
    model = HSTU(shape, draw_dense(shape, config.server.seed), torch.device("cpu"))
    longest, size = shape.max_sequence_tokens, config.pool.page_tokens
    lengths = data.draw(st.lists(st.integers(0, longest), min_size=1, max_size=5))
    requests = [
        draw(
            generator,
            tokens,
            int(generator.integers(1, shape.max_candidates + 1)),
            actions=bool(generator.integers(2)),
        )
        for tokens in lengths
    ]
    pages = Pages(config, 0)
    ids = [pages.take(tokens) for tokens in lengths]
    waste = data.draw(st.sampled_from([0.0, 0.25, 100.0]))
    expected = [wanted(request) for request in requests]
    cold = run(model, reference, requests, [0] * len(requests), pages, list(ids), waste)
    # Cut at page ends anywhere; some requests get no pages at all.
    cached = [size * int(generator.integers(0, tokens // size + 1)) for tokens in lengths]
    warm = run(model, reference, requests, cached, pages, list(ids), waste)
    unpaged = [i for i, count in enumerate(cached) if count == 0]
    mixed_ids = [None if i in unpaged else page for i, page in enumerate(ids)]
    mixed = run(model, reference, requests, cached, pages, mixed_ids, waste)
    for scores in (cold, warm, mixed):
        assert max(map(max_error, scores, expected)) <= TOLERANCE


def test_scores_depend_on_every_reused_layer_and_on_time(
    config: Config, reference: ReferenceScorer, draw: Draw, wanted: Scores
) -> None:
    """The exactness tests can fail: damage to one cached value or one second is visible."""
    generator = np.random.default_rng(5)
    model = HSTU(config.model, draw_dense(config.model, 1), torch.device("cpu"))
    request = draw(generator, 40, 8)
    expected = wanted(request)
    for layer in range(config.model.layers):
        for side in (0, 1):
            pages = Pages(config, 0)
            ids = pages.take(40)
            run(model, reference, [request], [0], pages, [ids])
            pages.layers[layer][ids[3], side, 1] += 0.5
            (scores,) = run(model, reference, [request], [40], pages, [ids])
            assert max_error(scores, expected) > 10 * TOLERANCE
    later = request.query_time + 10**6
    moved = reference.score(
        request.items, request.timestamps, request.candidates, request.actions, later
    )
    assert max_error(moved, expected) > 10 * TOLERANCE


def test_candidates_never_reach_the_pages(
    config: Config, reference: ReferenceScorer, draw: Draw
) -> None:
    generator = np.random.default_rng(6)
    model = HSTU(config.model, draw_dense(config.model, 1), torch.device("cpu"))
    request = draw(generator, 10, 8)  # two whole pages and a half
    pages = Pages(config, 0)
    ids = pages.take(10)
    run(model, reference, [request], [0], pages, [ids])
    written = ~torch.isnan(pages.storage).flatten(1).all(1)
    assert sorted(torch.nonzero(written)[:, 0].tolist()) == sorted(ids[:2].tolist())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_error_of_both_types_against_float64(config: Config, draw: Draw, dtype: str) -> None:
    """float32 stays within 1e-5; bfloat16 within 5e-2 of float64 and of itself when reusing.

    (Measured at this size: about 4e-7 and 2e-2. A bfloat16 has 8 bits: 4e-3 relative per step.)
    """
    exact = ReferenceScorer.from_config(config, torch.float64)
    shape = config.model.model_copy(update={"dtype": dtype})
    model = HSTU(shape, draw_dense(shape, config.server.seed), torch.device("cpu"))
    generator = np.random.default_rng(7)
    requests = [draw(generator, tokens, 16) for tokens in (64, 33, 5)]
    expected = [
        exact.score(r.items, r.timestamps, r.candidates, r.actions, r.query_time) for r in requests
    ]
    pages = Pages(config, 0, model.dtype)
    ids = [pages.take(request.tokens) for request in requests]
    bound = TOLERANCE if dtype == "float32" else 5e-2
    for cached in ([0, 0, 0], [48, 32, 4]):
        scores = run(model, exact, requests, cached, pages, list(ids))
        assert max(map(max_error, scores, expected)) <= bound


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=64))
def test_time_buckets_are_monotonic_and_do_not_depend_on_the_shape(values: list[int]) -> None:
    ordered = torch.tensor(sorted(values))
    buckets = time_bucket(ordered, 64)
    assert bool((buckets[1:] >= buckets[:-1]).all())
    assert int(buckets.min()) >= 0
    assert int(buckets.max()) < 64
    one_by_one = torch.cat([time_bucket(value[None], 64) for value in ordered])
    assert torch.equal(buckets, one_by_one)


def test_position_buckets_are_monotonic() -> None:
    buckets = position_bucket(np.arange(100_000), 24)
    assert buckets[:9].tolist() == list(range(9))
    assert bool((np.diff(buckets) >= 0).all())
    assert bool((np.diff(buckets) <= 1).all())
    assert buckets.max() == 23
