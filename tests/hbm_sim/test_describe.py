"""Characterising a workload or a log: reuse curves, α*, the report, the command."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import yaml
from hbm_load.reader import read_log
from hbm_sim.describe import describe
from hbm_sim.engine import EngineNode
from hbm_sim.reuse import distances, row_curve, user_curve
from hbm_sim.stream import make_stream
from hbm_sim.trace_cli import app
from hbm_sim.trace_report import write_report
from hbm_sim.trace_stream import node_for, stream_of_trace
from typer.testing import CliRunner

from tests.hbm_sim.small_workload import small_workload


def _log(path: Path, visits: int = 400) -> Path:
    random = np.random.default_rng(3)
    lines = ["time,user,items"]
    for visit in range(visits):
        user = random.integers(30)
        items = " ".join(str(item) for item in random.zipf(1.5, 6) % 500)
        lines.append(f"{1_700_000_000 + visit},{user},{items}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_reuse_distances_give_the_hits_of_an_lru_of_any_size() -> None:
    random = np.random.default_rng(1)
    names = random.zipf(1.3, 3000) % 200
    found = distances(names, np.ones(len(names)))
    for size in (5, 40, 150):
        held: OrderedDict[int, None] = OrderedDict()
        hits = 0
        for name in names.tolist():
            hits += name in held
            held[name] = None
            held.move_to_end(name)
            if len(held) > size:
                held.popitem(last=False)
        assert ((found >= 0.0) & (found <= size)).sum() == hits


def test_reuse_curves_rise_to_what_was_seen_before() -> None:
    stream = make_stream(small_workload(), 1, qps=40.0)
    mask = stream.counted
    users, rows = user_curve(stream, mask, 64.0), row_curve(stream, mask, 64.0)
    for curve in (users, rows):
        assert (np.diff(curve.hit_ratio) >= 0.0).all()
        assert curve.hit_ratio[-1] == pytest.approx(1.0 - curve.first_use, abs=1e-6)
    # More than half of a node's KV serves about the users that its own index serves.
    node = EngineNode(small_workload().node_spec(), 0.3, 1.0)
    node.serve(stream, 0, len(stream))
    assert node.outcome is not None
    hits = float((node.outcome.cached_tokens[mask] > 0).mean())
    expected = float(np.interp(0.7 * 96 * 2048, users.size_bytes, users.hit_ratio))
    assert hits == pytest.approx(expected, abs=0.12)


def test_a_workload_is_described_with_its_optima(tmp_path: Path) -> None:
    workload = small_workload()
    stream = make_stream(workload, 1, qps=40.0)
    found = describe(stream, workload.node_spec(), fine=False)
    quiet, busy = found.regimes
    assert (quiet.regime, busy.regime) == ("quiet", "busy")
    assert quiet.revisit_share < busy.revisit_share
    assert quiet.row_shares["1.0%"] < busy.row_shares["1.0%"]
    assert quiet.per_s == pytest.approx(40.0, rel=0.2)
    assert 0.5 < quiet.dispersion < 2.0
    assert found.shift == pytest.approx(
        abs(quiet.optimum.by_service.alpha - busy.optimum.by_service.alpha)
    )
    assert found.static_regret >= 0.0
    page = write_report(found, tmp_path / "small.html")[0].read_text()
    assert page.count("data:image/png;base64") == 3
    assert "quiet" in page
    plots = write_report(found, tmp_path / "small.png")
    assert len(plots) == 3
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)


def test_a_log_becomes_a_stream_of_the_same_requests(tmp_path: Path) -> None:
    trace = read_log(_log(tmp_path / "log.csv"), candidates=8).trace
    workload = node_for(trace, small_workload())
    assert workload.rows == trace.catalogue * 2
    stream = stream_of_trace(trace, workload)
    assert len(stream) == len(trace)
    for i in (0, 50, len(trace) - 1):
        items = trace.histories.events(int(trace.user[i]), int(trace.history_length[i])).items
        items = items[stream.dropped[i] :]
        span = slice(stream.history_at[i], stream.history_at[i + 1])
        assert stream.history_rows[span][::2].tolist() == (items * 2).tolist()
        assert stream.history_positions[span][::2].tolist() == list(range(len(items)))
    node = EngineNode(workload.node_spec(), 0.5, stream.rate, sampled_rows=len(stream.row_keys))
    node.serve(stream, 0, len(stream))
    assert node.check_integrity() == []


def test_the_command_describes_both_and_refuses_nonsense(tmp_path: Path) -> None:
    runner = CliRunner()
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(small_workload().model_dump(mode="json")))
    said = runner.invoke(app, ["describe", str(own), "--qps", "40", "--coarse", "--json"])
    assert said.exit_code == 0, said.output
    assert [each["regime"] for each in json.loads(said.stdout)["regimes"]] == ["quiet", "busy"]
    log = _log(tmp_path / "log.csv")
    report = tmp_path / "log.html"
    said = runner.invoke(
        app, ["describe", str(log), "--node", str(own), "--coarse", "--report", str(report)]
    )
    assert said.exit_code == 0, said.output
    assert "part-1" in said.stdout
    assert report.exists()
    for arguments, why in (
        ([str(tmp_path / "none.csv")], "none.csv"),
        ([str(log), "--columns", "a,b"], "name three"),
        ([str(own), "--gather", "sideways"], "serial or overlap"),
        ([str(log), "--format", "netflix"], "taobao, amazon, kuairand"),
        ([str(own), "--qps", "40", "--report", "x.pdf"], ".html or .png"),
    ):
        said = runner.invoke(app, ["describe", *arguments])
        assert said.exit_code == 2, said.output
        assert why in said.stderr
