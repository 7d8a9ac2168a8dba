"""The compiled loop of the simulated node: requests in order of arrival, first come, first served.

KV is the twin's own compiled index for one candidate (`hbm_policy.twin_users`), rows the pool's own
replacement kernel; both see what a server at the present α sees. Sampled misses stand for
misses / R (SHARDS with the adjustment: hot rows in or out of the sample move nothing).
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from hbm_policy.twin_users import mix, serve_user
from hbm_pool.host.tz_kernel import (
    FRESH_HEAD,
    FRESH_TAIL,
    IN_RING,
    ROWS,
    free_slots,
    insert,
    kernel,
    lookup,
    touch,
    wide,
)

from hbm_sim.engine_moves import (
    ANONYMOUS,
    CANDIDATES,
    CAUSAL,
    COMPUTE,
    COMPUTE_FREE,
    CONTEXT,
    CONTEXT_MS,
    COPIES,
    COPY_MS,
    CRITICAL,
    FIXED_MS,
    GATHER,
    GATHER_FREE,
    IDLE_DEBT,
    IDLE_SLICE_MS,
    KV_HITS,
    LINK,
    LINK_BUSY,
    LOOKED_UP,
    LRU,
    MISSED,
    MOVING,
    NOTED,
    OLDEST,
    OVERLAP,
    PAGE_TOKENS,
    QUEUE_LIMIT,
    RATE,
    REFILL_CREDIT,
    REFILL_DEBT,
    REFILL_RATE,
    REFUSED,
    REQUESTS,
    ROW_BYTES,
    ROW_MS,
    SERVICE,
    SLICE_MS,
    SLICED,
    SLO_MET,
    SLO_MS,
    TOKEN_MS,
    TOKENS_COMPUTED,
    TOKENS_REUSED,
    TRIMS,
    UNCACHED,
    WAITED,
    WAITING,
    NodeArrays,
    refill,
    slice_of_move,
    unused_rows,
)
from hbm_sim.lru_kernel import lru_insert, lru_lookup
from hbm_sim.row_mix import uniform

Floats = npt.NDArray[np.float64]


class Requests(NamedTuple):
    """The columns of a stream that the loop reads."""

    arrival_s: Floats
    user: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    candidates: npt.NDArray[np.int32]
    dropped: npt.NDArray[np.int32]
    history_at: npt.NDArray[np.int64]
    history_rows: npt.NDArray[np.int32]
    history_positions: npt.NDArray[np.int32]
    candidate_at: npt.NDArray[np.int64]
    candidate_rows: npt.NDArray[np.int32]


class Outcome(NamedTuple):
    """What became of each request of a stream, `[n]` each; 0 until it is served."""

    latency_ms: Floats  # from the intended arrival; NaN for a refused request
    service_ms: Floats
    gather_ms: Floats
    compute_ms: Floats
    start_ms: Floats  # when it was begun, on the stream's clock
    cached_tokens: npt.NDArray[np.int32]
    missed_rows: Floats  # true number, estimated from the sample
    looked_up_rows: Floats  # likewise; rows that a request asks for twice count once
    dropped: npt.NDArray[np.bool_]  # refused: too many waited


def empty_outcome(n: int) -> Outcome:
    """Columns for `n` requests, none of them served."""
    return Outcome(
        latency_ms=np.zeros(n),
        service_ms=np.zeros(n),
        gather_ms=np.zeros(n),
        compute_ms=np.zeros(n),
        start_ms=np.zeros(n),
        cached_tokens=np.zeros(n, np.int32),
        missed_rows=np.zeros(n),
        looked_up_rows=np.zeros(n),
        dropped=np.zeros(n, np.bool_),
    )


@kernel
def _prints(node: NodeArrays, user: int, dropped: int, pages: int) -> None:
    """Fingerprints of a history: equal prefixes agree, and a cut start changes all of them."""
    base = np.uint32(mix(wide(user) * 4097 + wide(dropped)) & np.uint64(0xFFFFFFFF))
    for page in range(pages):
        node.prints[page] = base ^ np.uint32((page * 2654435761) & 0xFFFFFFFF)


@kernel
def _row_hits(node: NodeArrays, row: int) -> bool:
    if node.fixed[LRU] == 1.0:
        return lru_lookup(node.lru, row)
    slot = lookup(node.tz, row)
    if slot >= 0:
        touch(node.tz, slot)
    return slot >= 0


@kernel
def _serve_rows(node: NodeArrays, requests: Requests, i: int, cached: int) -> tuple[int, int]:
    """Rows of the candidates and of the tokens that KV does not hold. -> looked up, missed.

    All are looked up before the missed ones are inserted, as in the pool; a row asked for twice
    counts once, at its last position.
    """
    whole = node.whole
    mark = whole[REQUESTS] + whole[REFUSED] + 1
    notes = node.real[REFILL_RATE] > 0.0
    looked_up = wide(0)
    missed = wide(0)
    first = requests.history_at[i]
    end = requests.history_at[i + 1]
    in_history = end - first
    begin = requests.candidate_at[i]
    total = in_history + requests.candidate_at[i + 1] - begin
    for j in range(total - 1, -1, -1):
        if j < in_history:
            if requests.history_positions[first + j] < cached:
                break
            row = wide(requests.history_rows[first + j])
        else:
            row = wide(requests.candidate_rows[begin + j - in_history])
        if node.stamp[row] == mark:
            continue
        node.stamp[row] = mark
        looked_up += 1
        if notes:
            node.heat[row] += np.float32(1.0)
        if not _row_hits(node, row):
            node.missed[missed] = row
            missed += 1
    if notes:
        whole[NOTED] += looked_up
    if node.fixed[LRU] == 1.0:
        for j in range(missed):
            lru_insert(node.lru, wide(node.missed[j]))
    else:
        state = node.tz.state
        room = max(1, state[IN_RING]) * state[ROWS]
        if state[ROWS] == 1:
            room += state[FRESH_TAIL] - state[FRESH_HEAD]
        else:
            room += free_slots(node.tz)
        for j in range(min(missed, room)):
            insert(node.tz, wide(node.missed[j]))
    whole[LOOKED_UP] += looked_up
    whole[MISSED] += missed
    return looked_up, missed


@kernel
def _idle(node: NodeArrays, idle_ms: float, link_idle_ms: float, since_ms: float) -> bool:
    """What a node does between two requests: slices of a move, refill. -> refill was at work."""
    real = node.real
    if node.whole[MOVING] == 1:
        real[IDLE_DEBT] += idle_ms
        while real[IDLE_DEBT] >= node.fixed[IDLE_SLICE_MS] and node.whole[MOVING] == 1:
            real[IDLE_DEBT] -= node.fixed[IDLE_SLICE_MS]
            slice_of_move(node)
    if node.whole[MOVING] == 0:
        real[IDLE_DEBT] = 0.0
    rate = real[REFILL_RATE]
    if rate <= 0.0 or link_idle_ms <= 0.0:
        return False
    unused = unused_rows(node)
    if unused == 0:
        real[REFILL_CREDIT] = 0.0
        return False
    # A bucket of one second: what could not be used while the link was busy is not all lost.
    real[REFILL_CREDIT] = min(real[REFILL_CREDIT] + rate * since_ms, rate * 1000.0)
    copied = min(real[REFILL_CREDIT], link_idle_ms * node.fixed[LINK])
    wanted = copied * node.fixed[RATE] / node.fixed[ROW_BYTES] + real[REFILL_DEBT]
    rows = refill(node, min(wide(wanted), unused))
    real[REFILL_DEBT] = wanted - wide(wanted)
    took = rows * node.fixed[ROW_BYTES] / node.fixed[RATE]
    real[REFILL_CREDIT] = max(0.0, real[REFILL_CREDIT] - took)
    real[LINK_BUSY] += took / node.fixed[LINK]
    return bool(rows > 0)


@kernel
def _refuses(node: NodeArrays, outcome: Outcome, queue: npt.NDArray[np.int64], at: int) -> bool:
    """Whether a request that comes now finds too many waiting."""
    whole = node.whole
    arrival_ms = outcome.start_ms[queue[at]]
    while whole[OLDEST] < at:
        before = queue[whole[OLDEST]]
        if not outcome.dropped[before]:
            if outcome.start_ms[before] > arrival_ms:
                break
            whole[WAITING] -= 1
        whole[OLDEST] += 1
    full: bool = whole[WAITING] >= node.fixed[QUEUE_LIMIT]
    return full


@numba.njit(nogil=True, cache=True, error_model="numpy", _nrt=False)  # type: ignore[untyped-decorator]
def serve(
    node: NodeArrays,
    requests: Requests,
    queue: npt.NDArray[np.int64],
    begin: int,
    end: int,
    until_ms: float,
    outcome: Outcome,
) -> int:
    """Serves `queue[begin:end]` (indices of requests, by arrival) as far as they begin before
    `until_ms`. -> position of the first that does not."""
    whole, real, fixed = node.whole, node.real, node.fixed
    overlap = fixed[OVERLAP] == 1.0
    at = begin
    while at < end:
        i = queue[at]
        arrival = requests.arrival_s[i] * 1e3
        free = real[GATHER_FREE] if overlap else real[COMPUTE_FREE]
        start = max(arrival, free)
        if start >= until_ms:
            break
        outcome.start_ms[i] = arrival
        if _refuses(node, outcome, queue, at):
            outcome.dropped[i] = True
            outcome.latency_ms[i] = np.nan
            whole[REFUSED] += 1
            at += 1
            continue
        link_free = real[GATHER_FREE]
        moving = whole[MOVING] == 1
        refilled = _idle(node, start - free, start - link_free, start - link_free)
        begun = start
        if moving and start > free:
            # It came while the slice of an idle server was under way.
            real[SLICED] += fixed[SLICE_MS] * uniform(i, 3)
            begun += fixed[SLICE_MS] * uniform(i, 3)
        if whole[MOVING] == 1:
            slice_of_move(node)
            real[SLICED] += fixed[SLICE_MS]
            begun += fixed[SLICE_MS]
        tokens = wide(requests.tokens[i])
        candidates = wide(requests.candidates[i])
        user = requests.user[i]
        page_tokens = wide(fixed[PAGE_TOKENS])
        pages = tokens // page_tokens
        _prints(node, user, wide(requests.dropped[i]), pages)
        serve_user(
            node.users,
            user,
            tokens,
            node.prints[:pages],
            page_tokens,
            fixed[TRIMS] == 1.0,
            node.cached,
        )
        cached = node.cached[0]
        looked_up, missed = _serve_rows(node, requests, i, cached)
        new = tokens - cached
        context = new * (cached + tokens + 1) / 2.0 + candidates * tokens
        charged = context if fixed[CAUSAL] == 1.0 else float((new + candidates) * tokens)
        compute = fixed[FIXED_MS] + fixed[TOKEN_MS] * (new + candidates)
        compute += fixed[CONTEXT_MS] * charged
        gather = fixed[ROW_MS] * missed / fixed[RATE]
        whole[COPIES] += missed > 0
        if refilled and missed > 0:
            # The refiller copies for this share of the time; who comes meanwhile waits for its end.
            duty = min(1.0, real[REFILL_RATE] / fixed[LINK])
            if uniform(i, 1) < duty:
                begun += fixed[COPY_MS] * uniform(i, 2)
                whole[CRITICAL] += 1
        gathered = begun + gather
        real[GATHER_FREE] = gathered
        done = (max(gathered, real[COMPUTE_FREE]) if overlap else gathered) + compute
        real[COMPUTE_FREE] = done
        service = max(compute, gather) if overlap else compute + gather
        real[LINK_BUSY] += missed / fixed[RATE] * fixed[ROW_BYTES] / fixed[LINK]
        real[GATHER] += gather
        real[COMPUTE] += compute
        real[SERVICE] += service
        real[WAITED] += 0.05 * (start - arrival - real[WAITED])
        whole[REQUESTS] += 1
        whole[WAITING] += 1
        whole[KV_HITS] += cached > 0
        whole[ANONYMOUS] += user == 0
        whole[UNCACHED] += -(-pages // node.users.fingerprints.shape[1]) > node.users.capacity[0]
        whole[TOKENS_REUSED] += cached
        whole[TOKENS_COMPUTED] += new
        whole[CANDIDATES] += candidates
        whole[CONTEXT] += round(context)
        outcome.latency_ms[i] = done - arrival
        whole[SLO_MET] += done - arrival <= fixed[SLO_MS]
        outcome.service_ms[i] = service
        outcome.gather_ms[i] = gather
        outcome.compute_ms[i] = compute
        outcome.start_ms[i] = start
        outcome.cached_tokens[i] = cached
        outcome.missed_rows[i] = missed / fixed[RATE]
        outcome.looked_up_rows[i] = looked_up / fixed[RATE]
        at += 1
    return at
