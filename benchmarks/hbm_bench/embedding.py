"""Embedding rows: lookup + gather of a resident batch, and requests beside a refill.

* `gather`: all rows are in the cache; `EmbeddingCache.gather` (index, replacement counters and the
  copy) and a plain `torch.index_select` from a tensor of the same rows take turns on the same
  Zipf-drawn batches. Goal: CPU >= 0.9 x, GPU >= 0.5 x the plain one. On CPU the arena asks for huge
  pages, which torch does not; beside the plain tensor stands one that lies in them too.
* `refill`: batches with misses over a modelled link, in turn with the refiller at rest and at work
  on extents that have just been won (4 % of the cache). Goal: foreground P99 <= 1.05 x, and under
  1 % of the refiller's copies on the critical path. `open_load`: the batches arrive at random, so
  that they use half of the link, and a latency counts from the arrival; both arms have the same
  times of arrival. `saturated`: batch after batch without a pause.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hbm_pool.device.arena import Arena
from hbm_pool.device.embedding import EmbeddingCache
from hbm_pool.device.refill import Refiller
from hbm_pool.device.row_counters import GatherStats
from hbm_pool.host.config import KVSpec, PoolShape, TableSpec
from hbm_pool.host.link import LinkModel
from hbm_pool.host.row_store import RamRowStore

EXTENT_BYTES = 2 << 20
LINK_BYTES_PER_S = 50e6
"""Slow, so that what a batch takes is mostly the link and not the interpreter."""
ROUND_BATCHES = 50
_KV = KVSpec(layers=2, heads=2, head_dim=64, page_tokens=64)


def run(quick: bool, seed: int, device: str = "cpu") -> dict[str, Any]:
    """All figures; `quick` is a smoke run."""
    torch.set_num_threads(1)
    repetitions = 50 if quick else 1000
    figures: dict[str, Any] = {
        f"gather_{width * 4}_bytes": {
            f"{rows}_rows": gather(width, rows, repetitions, seed, device)
            for rows in ((2560,) if quick else (2560, 16384))
        }
        for width in (32, 256)
    }
    if device == "cpu":
        batches = 150 if quick else 4000
        figures["refill"] = {
            "open_load": refill(batches, seed, load=0.5),
            "saturated": refill(batches, seed, load=None),
        }
    return figures


def gather(width: int, rows: int, repetitions: int, seed: int, device: str) -> dict[str, Any]:
    """All hits: the cache against `index_select`, batch by batch in turn."""
    resident = 65_536
    cache = _cache(width, resident, extra_extents=8, device=device, link=None)
    random = np.random.default_rng(seed)
    for start in range(0, resident, 8192):
        _gather(cache, torch.arange(start, start + 8192), width, device)
    plain = torch.empty((resident, width), device=device).normal_()
    tables = {"index_select": plain}
    if device == "cpu":
        own = Arena(1, plain.nbytes, device).rows(4 * width, plain.dtype, width)
        tables["index_select_in_huge_pages"] = own.copy_(plain)
    out = torch.empty((rows, width), device=device)
    misses = 0

    def ours(ids: torch.Tensor) -> None:
        nonlocal misses
        misses += cache.gather({"item": ids}, {"item": out}).misses

    def theirs(table: torch.Tensor, ids: torch.Tensor) -> None:
        torch.index_select(table, 0, ids, out=out)

    turns: list[tuple[str, Callable[[torch.Tensor], None]]] = [("cache", ours)]
    turns += [(name, partial(theirs, table)) for name, table in tables.items()]
    times: dict[str, list[float]] = {name: [] for name, _ in turns}
    for number in range(repetitions):
        ids = torch.from_numpy(_zipf(random, resident, rows)).to(device)
        # Who goes first finds ids and buffer cold in the CPU's caches: that goes round.
        first = number % len(turns)
        for name, turn in turns[first:] + turns[:first]:
            begin = time.perf_counter()
            turn(ids)
            _settle(device)
            times[name].append(time.perf_counter() - begin)
    cached = np.median(times["cache"])
    return {
        "goal_speed_ratio": 0.9 if device == "cpu" else 0.5,
        **{f"speed_ratio_p50_to_{name}": float(np.median(times[name]) / cached) for name in tables},
        **{name: _percentiles(taken) for name, taken in times.items()},
        "misses": misses,
    }


def refill(batches: int, seed: int, load: float | None) -> dict[str, Any]:
    """Rounds of `ROUND_BATCHES` with misses, each with the refiller resting and then working.

    `load` is the share of the link that the batches need, None for no pause between them.
    """
    width, rows = 64, 1024
    resident = 49_152
    link = LinkModel(LINK_BYTES_PER_S)
    cache = _cache(width, resident, extra_extents=0, device="cpu", link=link)
    refiller = Refiller(cache, LINK_BYTES_PER_S / 10)
    random = np.random.default_rng(seed)
    before = link.counters().foreground_bytes
    for number in range(400):
        _gather(cache, torch.from_numpy(_zipf(random, 4 * resident, rows)), width, "cpu")
        if number == 199:
            before = link.counters().foreground_bytes
    link_s = (link.counters().foreground_bytes - before) / 200 / LINK_BYTES_PER_S
    won = max(1, round(0.04 * cache.num_extents))
    rounds: dict[bool, list[list[float]]] = {False: [], True: []}
    waits: dict[bool, list[float]] = {False: [], True: []}
    try:
        while len(rounds[True]) * ROUND_BATCHES < batches:
            gaps = (
                random.exponential(link_s / load, ROUND_BATCHES)
                if load
                else np.zeros(ROUND_BATCHES)
            )
            for working in (False, True):
                # Rows of its own: the second arm must not find what the first has fetched.
                drawn = [torch.from_numpy(_zipf(random, 4 * resident, rows)) for _ in gaps]
                cache.grow(cache.drop(won))
                if working:
                    refiller.start()
                    refiller.wake()
                taken, waited = _served(cache, drawn, gaps, width)
                rounds[working].append(taken)
                waits[working] += waited
                if working:
                    refiller.stop()
        counters = refiller.counters()
    finally:
        refiller.close()
    rest, work = (_percentiles(np.ravel(rounds[working])) for working in (False, True))
    tail = "p99_us" if "p99_us" in rest else "p95_us"
    return {
        "goal_tail_ratio": 1.05,
        "tail": tail,
        "tail_ratio": work[tail] / rest[tail],
        # One pause of the machine lies in one round: the interval says how much one round weighs.
        "tail_ratio_95_percent": _tail_ratio_interval(rounds, int(tail[1:3]), seed),
        "p50_ratio": work["p50_us"] / rest["p50_us"],
        "resting": rest,
        "refilling": work,
        "resting_behind_others_on_the_link": _percentiles(waits[False]),
        "refilling_behind_others_on_the_link": _percentiles(waits[True]),
        "goal_critical_share": 0.01,
        "critical_share": counters.critical_copies / max(counters.copies, 1),
        "copies": counters.copies,
        "rows": counters.rows,
        "link_us_per_batch": link_s * 1e6,
    }


def _tail_ratio_interval(
    rounds: dict[bool, list[list[float]]], percentile: int, seed: int
) -> tuple[float, float]:
    """Bootstrap over pairs of rounds: 95 % interval of the tail with refill over that without."""
    random = np.random.default_rng(seed)
    resting, working = np.array(rounds[False]), np.array(rounds[True])
    ratios = []
    for _ in range(1000):
        drawn = random.integers(len(resting), size=len(resting))
        tails = [np.percentile(each[drawn], percentile) for each in (working, resting)]
        ratios.append(tails[0] / tails[1])
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)


def _served(
    cache: EmbeddingCache, drawn: list[torch.Tensor], gaps: npt.NDArray[np.float64], width: int
) -> tuple[list[float], list[float]]:
    """Batches in the order of their arrival, `gaps` apart: how long each took from then on, and
    how much longer than its own bytes take it was on the link.

    Without gaps a batch arrives when the one before it is done.
    """
    times = []
    waits = []
    arrival = time.perf_counter()
    for ids, gap in zip(drawn, gaps, strict=True):
        arrival = arrival + gap if gap else time.perf_counter()
        while (left := arrival - time.perf_counter()) > 0.0:
            time.sleep(left)
        stats = _gather(cache, ids, width, "cpu")
        times.append(time.perf_counter() - arrival)
        waits.append(stats.link_ms / 1e3 - stats.bytes / LINK_BYTES_PER_S)
    return times, waits


def _cache(
    width: int, resident: int, extra_extents: int, device: str, link: LinkModel | None
) -> EmbeddingCache:
    """A cache with room for `resident` rows and more, of a table four times as large."""
    rows = 4 * resident
    # Twice the room: with a tenth of it on probation all `resident` rows find a place.
    extents = (
        2 * resident * width * 4 // EXTENT_BYTES + extra_extents
        if link is None
        else (resident * width * 4 // EXTENT_BYTES)
    )
    shape = PoolShape(
        pool_bytes=(extents + 64) * EXTENT_BYTES,
        extent_bytes=EXTENT_BYTES,
        tables=(TableSpec("item", rows, width),),
        kv=_KV,
        max_sequence_tokens=64,
    )
    table = np.random.default_rng(0).standard_normal((rows, width), dtype=np.float32)
    arena = Arena(extents, EXTENT_BYTES, device)
    cache = EmbeddingCache(shape, arena, {"item": RamRowStore(table, "item")}, link=link)
    cache.grow(np.arange(extents))
    return cache


def _gather(cache: EmbeddingCache, ids: torch.Tensor, width: int, device: str) -> GatherStats:
    out = torch.empty((ids.numel(), width), device=device)
    return cache.gather({"item": ids.to(device)}, {"item": out})


def _zipf(random: np.random.Generator, rows: int, n: int) -> npt.NDArray[np.int64]:
    """Row ids with popularity 1 / rank^0.8, by inversion of the continuous distribution."""
    uniform = random.random(n)
    ranks = ((rows**0.2 - 1.0) * uniform + 1.0) ** 5.0
    ids: npt.NDArray[np.int64] = np.minimum(ranks, rows - 1).astype(np.int64)
    return ids


def _settle(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _percentiles(times_s: Sequence[float] | npt.NDArray[np.float64]) -> dict[str, float | int]:
    """P99 only where 1,000 values stand behind it, else P95."""
    tail = 99 if len(times_s) >= 1000 else 95
    return {
        "p50_us": float(np.percentile(times_s, 50) * 1e6),
        f"p{tail}_us": float(np.percentile(times_s, tail) * 1e6),
        "n": len(times_s),
    }
