"""What the streams of a suite are like: rates, users, rows, and α* of each regime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from hbm_sim.describe import RegimeCharacter, characterise

from hbm_study.cells import Scene
from hbm_study.results import BEST_STATIC, Results
from hbm_study.scene import SceneData


def characters(
    results: Results, scenes: Sequence[Scene], cache: Path
) -> Iterator[tuple[str, RegimeCharacter]]:
    """(workload, character) of each regime, on the first finished seed of each scene. Static splits
    are taken from the cache that the cells were made with."""
    for scene in scenes:
        seed = min(results.cells(scene, BEST_STATIC))
        data = SceneData(scene._replace(seed=seed), cache)
        node = data.workload.node
        for regime in data.best:
            found = data.optimum_of(regime)
            yield (
                scene.workload,
                characterise(data.stream, found, node.token_bytes, node.row_bytes),
            )
