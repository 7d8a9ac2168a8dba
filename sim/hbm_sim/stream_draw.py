"""The compiled half of a stream: who comes back, and which sampled rows a history holds."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from hbm_sim.row_mix import uniform

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def draw_visits(
    who: Floats,
    back: Ints,
    hot: Ints,
    one_off: Ints,
    revisit: Floats,
    hot_share: Floats,
    first_length: Numbers,
    growth: Numbers,
    population: Ints,
    previous: Ints,
    life: Ints,
    last_visit: Ints,
) -> None:
    """Users of all requests in turn, `[n]` each: `population` (index of the user), `previous`
    (that user's last request, -1: none) and `life` (tokens ever, this visit's included).

    `who` is a uniform number: below `revisit` the user of the request `back` before returns, if
    there is one; else one of the hot users comes with `hot_share`; else a one-off.
    `last_visit` [users] is scratch, -1 everywhere.
    """
    for i in range(who.size):
        if who[i] < revisit[i] and back[i] <= i:
            user = population[i - back[i]]
        elif who[i] < revisit[i] + (1.0 - revisit[i]) * hot_share[i]:
            user = hot[i]
        else:
            user = one_off[i]
        before = last_visit[user]
        population[i] = user
        previous[i] = before
        life[i] = growth[i] + (first_length[i] if before < 0 else life[before])
        last_visit[user] = i


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def most_rows(start: int, counts: Ints, previous: Ints, totals: Ints) -> int:
    """Sampled rows ever drawn for the histories of the requests from `start` on, `totals` [n];
    `counts` [5, m] as in `fill`. -> their sum, which bounds what `fill` writes."""
    most = 0
    for j in range(counts.shape[1]):
        i = start + j
        total = counts[0, j] + counts[1, j] + counts[2, j]
        if previous[i] >= 0:
            total += totals[previous[i]]
        totals[i] = total
        most += total
    return most


@numba.njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def _pick(accept: Floats, alias: Numbers, rows: Numbers, seed: np.uint64, counter: int) -> int:
    at = uniform(seed, counter) * accept.size
    place = np.int64(at)
    if at - place >= accept[place]:
        place = np.int64(alias[place])
    return np.int64(rows[place])  # type: ignore[return-value]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def fill(
    start: int,
    counts: Ints,
    base: Ints,
    latest: Ints,
    previous: Ints,
    dropped: Numbers,
    main_accept: Floats,
    main_alias: Numbers,
    main_rows: Numbers,
    shelf_accept: Floats,
    shelf_alias: Numbers,
    shelf_rows: Numbers,
    seed: np.uint64,
    counter: int,
    history_at: Ints,
    history_rows: Numbers,
    history_positions: Numbers,
    candidate_rows: Numbers,
) -> int:
    """Histories and candidates of the requests from `start` on. -> counter for the next draw.

    `counts` [5, m]: sampled rows of the history's beginning (drawn at the first visit), of its
    newest tokens from catalogue and shelf, of the candidates from catalogue and shelf. `base` [m]
    is where the newest tokens begin in the whole life of the history, `latest` [m] their number.
    Positions rise within a request.
    """
    at = history_at[start]
    candidate = 0
    for j in range(counts.shape[1]):
        i = start + j
        before = previous[i]
        cut = dropped[i]
        if before >= 0:
            shift = dropped[before] - cut
            for k in range(history_at[before], history_at[before + 1]):
                position = history_positions[k] + shift
                if position >= 0:
                    history_rows[at] = history_rows[k]
                    history_positions[at] = position
                    at += 1
        drawn = counts[0, j]
        for k in range(drawn):
            position = np.int64((k + uniform(seed, counter)) * base[j] / drawn) - cut
            if position >= 0:
                history_rows[at] = _pick(main_accept, main_alias, main_rows, seed, counter + 1)
                history_positions[at] = position
                at += 1
            counter += 2
        first = base[j] - cut
        shelved = counts[2, j]
        drawn = counts[1, j] + shelved
        for k in range(drawn):
            position = first + np.int64((k + uniform(seed, counter)) * latest[j] / drawn)
            # Which of them are on the shelf: a sample without replacement, in order.
            if uniform(seed, counter + 1) * (drawn - k) < shelved:
                shelved -= 1
                row = _pick(shelf_accept, shelf_alias, shelf_rows, seed, counter + 2)
            else:
                row = _pick(main_accept, main_alias, main_rows, seed, counter + 2)
            counter += 3
            if position >= 0:
                history_rows[at] = row
                history_positions[at] = position
                at += 1
        history_at[i + 1] = at
        for _ in range(counts[3, j]):
            candidate_rows[candidate] = _pick(main_accept, main_alias, main_rows, seed, counter)
            candidate += 1
            counter += 1
        for _ in range(counts[4, j]):
            candidate_rows[candidate] = _pick(shelf_accept, shelf_alias, shelf_rows, seed, counter)
            candidate += 1
            counter += 1
    return counter
