"""A sample of the answers, scored again by the cache-free reference model."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from hbm_load.records import Records
from hbm_load.trace import Trace

from hbm_demo.settings import MODEL_PRESET

TOLERANCE: Final = 1e-5
"""Largest absolute difference of scores of order 1 that fp32 allows (design: exactness)."""


class ScoreCheck(NamedTuple):
    """Outcome of the check."""

    checked: int
    mismatched: int
    worst_error: float
    first_mismatch: str


def check_scores(arms: dict[str, Records], trace: Trace, seed: int) -> ScoreCheck:
    """Scores the sampled requests of every arm anew. `seed` is that of the servers' weights."""
    import torch
    from hbm_serving.config import load_config
    from hbm_serving.reference import ReferenceScorer, max_error

    torch.set_num_threads(1)
    scorer = ReferenceScorer.from_config(load_config(MODEL_PRESET, {"server.seed": seed}))
    checked = mismatched = 0
    worst, first = 0.0, ""
    expected: dict[int, np.ndarray[tuple[int], np.dtype[np.float32]]] = {}
    for name, records in arms.items():
        for index, scores in records.scores.items():
            request = trace.request(index)
            if index not in expected:
                expected[index] = scorer.score(
                    request.items,
                    request.timestamps,
                    request.candidates,
                    query_time=request.query_time,
                )
            error = max_error(np.array(scores, dtype=np.float32), expected[index])
            checked += 1
            worst = max(worst, error)
            if not error <= TOLERANCE:
                mismatched += 1
                first = first or (
                    f"{name}: request {records.request_id[index]} of user {request.user_id} "
                    f"differs by {error:g}"
                )
    return ScoreCheck(checked, mismatched, worst, first)
