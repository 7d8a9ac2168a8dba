"""Episodes: what they hold, and that a folder gives back what was simulated."""

from __future__ import annotations

import numpy as np
import pytest
from hbm_learn.episode import Library, around, service_ms
from hbm_sim.optimum import static_run


def test_a_library_reads_back_what_it_simulated(library, folder, episode) -> None:
    again = Library(library.domain, folder)
    assert again.missing([1000, 1999]) == [1999]
    found = again.episode(1000)
    assert found is not episode
    assert found.stream.fingerprint() == episode.stream.fingerprint()
    assert np.array_equal(found.track.records, episode.track.records)
    assert found.track.costs == episode.track.costs
    assert found.spec == episode.spec
    assert all(np.array_equal(a, b) for a, b in zip(found.tables, episode.tables, strict=True))


def test_a_file_that_was_cut_short_is_simulated_anew(tmp_path, library, episode) -> None:
    first = Library(library.domain, tmp_path)
    first.episode(1000)
    path = next(tmp_path.glob("*.npz"))
    path.write_bytes(path.read_bytes()[:1000])
    found = Library(library.domain, tmp_path).episode(1000)
    assert found.stream.fingerprint() == episode.stream.fingerprint()


def test_tables_hold_what_a_static_split_takes(episode) -> None:
    run = static_run(episode.stream, episode.spec, float(episode.alphas[4]))
    assert np.allclose(episode.tables.gather_ms[:, 4], run.gather_ms, rtol=1e-6)
    assert np.allclose(episode.tables.compute_ms[:, 4], run.compute_ms, rtol=1e-6)


def test_every_stretch_is_as_busy_at_its_best_split_as_was_drawn(episode) -> None:
    service = service_ms(episode.tables, episode.overlap)
    edges = np.concatenate([[0], np.cumsum([phase.requests for phase in episode.drawn.phases])])
    arrival_s = np.concatenate([[0.0], episode.stream.arrival_s])
    for begin, end, load in zip(edges[:-1], edges[1:], episode.drawn.loads, strict=True):
        busy_s = service[begin:end].mean(axis=0).min() * (end - begin) / 1e3
        # Gaps are exponential: their sum scatters by 1 / sqrt(n).
        scatter = 4.0 / np.sqrt(end - begin)
        assert busy_s / (arrival_s[end] - arrival_s[begin]) == pytest.approx(load, rel=scatter)


def test_the_reference_beats_every_static_split(episode) -> None:
    service = service_ms(episode.tables, episode.overlap)
    assert episode.best_ms.mean() <= service.mean(axis=0).min() * 1.001
    assert episode.best_ms.mean() >= service.min(axis=1).mean()


def test_a_mean_around_a_row_is_one_of_its_neighbours() -> None:
    values = np.arange(10.0)[:, None]
    means = around(values, 4)[:, 0]
    assert means[5] == 5.0
    assert means[0] == 1.0
    assert means[9] == 8.0
