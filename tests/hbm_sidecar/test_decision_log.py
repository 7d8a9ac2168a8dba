"""What decide logs on request, and `hbm replay-decisions` on it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hbm_pool.contracts.control_block import SidecarBlock, SidecarView
from hbm_pool.contracts.records import CURVES, INTENT
from hbm_sidecar.artefact import copy_path
from hbm_sidecar.cli import replay
from hbm_sidecar.config import SidecarConfig
from hbm_sidecar.decide import Decider
from hbm_sidecar.log import configure
from typer.testing import CliRunner

from tests.residual_model import residual_model, write_residual

TICK_NS = 250_000_000


class Pod:
    """A server's file, a sidecar's file and a decider on a clock of its own."""

    def __init__(self, run_dir: Path, server_class, **flags: object) -> None:
        self.config = SidecarConfig(run_dir=run_dir, tick_ms=250.0, **flags)
        self.server = server_class(run_dir, seed=1)
        self.server.traffic = 5
        self.block = SidecarBlock.create(run_dir)
        self.generation = 0
        self.wish()
        self.now_ns = 0
        self.decider = Decider(self.config, configure("test"), lambda: self.now_ns)
        self.curves = np.zeros((), dtype=CURVES)

    def wish(self, residual_hash: int = 0, **fields: object) -> None:
        self.generation += 1
        intent = np.zeros((), dtype=INTENT)
        wanted = self.config.partition().model_copy(update=fields)
        wanted.fill_intent(intent, self.generation, 1, residual_hash)
        self.block.write_intent(intent)

    def run(self, ticks: int) -> None:
        for _ in range(ticks):
            self.server.cycle()
            stamp = int(self.server.block.telemetry["monotonic_ns"])
            self.now_ns = max(self.now_ns + TICK_NS, stamp)
            curves, alpha = self.curves, np.linspace(0.1, 0.9, 17)
            curves["boot_epoch"], curves["points"] = self.server.block.boot_epoch, 17
            curves["requests"] += np.uint64(20)
            curves["warm"] = 1.0
            curves["alpha"][:17] = alpha
            curves["cost_ms"][:17] = 5.0 + 8.0 * (alpha - 0.8) ** 2
            self.block.write_curves(curves)
            self.decider.prepare()
            self.decider.dry()
            self.decider.tick(self.now_ns)


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "decisions.jsonl"


@pytest.fixture
def pod(run_dir: Path, log_file: Path, server_class):
    log_file.parent.mkdir()

    def make(**flags: object) -> Pod:
        return Pod(
            run_dir,
            server_class,
            decision_log=log_file,
            stale_ms=3.6e6,
            curve_stale_ms=3.6e6,
            **flags,
        )

    return make


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def again(*arguments: object):
    return CliRunner().invoke(replay, [str(each) for each in arguments])


def test_every_tick_is_logged_and_replays(pod, log_file) -> None:
    here = pod()
    here.run(120)
    here.wish(slew_per_s=0.2)
    here.run(30)
    found = lines(log_file)
    assert sum("start" not in each for each in found) == 150
    assert sum("start" in each for each in found) == 2, "another price of moves is said"
    result = again(log_file)
    assert result.exit_code == 0, result.output
    assert "150 decisions are the same, bit for bit" in result.stdout
    ticks = SidecarView.open(here.config.run_dir).read_decisions(10)
    place = found[0]["decision"].index("target")
    assert found[-1]["decision"][place] == float(ticks[-1]["target"])


def test_a_difference_exits_1_and_no_log_exits_2(pod, log_file) -> None:
    pod().run(40)
    found = lines(log_file)
    place = found[0]["decision"].index("target")
    found[20]["decision"][place] += 0.01
    log_file.write_text("".join(json.dumps(each) + "\n" for each in found))
    result = again(log_file)
    assert result.exit_code == 1
    assert "line 21: target was" in result.stdout
    for wrong in (log_file.with_name("missing"), log_file.parent):
        result = again(wrong)
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
    log_file.write_bytes(b"\xff\xfe\n")
    assert again(log_file).exit_code == 2


def test_the_log_is_bounded_and_each_file_replays_alone(pod, log_file) -> None:
    here = pod(decision_log_bytes=1 << 16)
    here.run(400)
    old = log_file.with_name("decisions.jsonl.1")
    assert sorted(log_file.parent.iterdir()) == [log_file, old]
    for file in (old, log_file):
        assert file.stat().st_size <= (1 << 16) + 8192
        assert again(file).exit_code == 0


def test_a_new_process_leaves_the_log_of_the_one_before(pod, log_file) -> None:
    pod().run(20)
    here = pod()
    here.run(5)
    assert len(lines(log_file)) == 6
    assert len(lines(log_file.with_name("decisions.jsonl.1"))) == 21
    assert again(log_file).exit_code == 0


def test_a_log_that_cannot_be_written_is_given_up_with_a_word(pod, log_file, capfd) -> None:
    log_file.mkdir()
    here = pod()
    (log_file.parent / "decisions.jsonl.1").mkdir()
    (log_file.parent / "decisions.jsonl.1" / "x").write_text("")
    here.run(10)
    assert capfd.readouterr().err.count("not logged any more") == 1
    assert len(SidecarView.open(here.config.run_dir).read_decisions(100)) == 10


def test_the_residual_in_use_is_named_and_needed(pod, log_file, tmp_path) -> None:
    here = pod(residual_gain=1.0)
    content = residual_model((1.0, 0.5, -0.5, 0.0))
    sha256 = write_residual(tmp_path / "r.onnx", content)
    copy_path(here.config.run_dir, sha256[:16]).write_bytes(content)
    here.run(10)
    here.wish(residual_hash=int(sha256[:16], 16))
    here.run(40)
    found = lines(log_file)
    assert [each["residual"] for each in found if "start" in each] == ["", sha256[:16]]
    assert again(log_file).exit_code == 2, "its file is not beside the log"
    result = again(log_file, "--residuals", here.config.run_dir)
    assert result.exit_code == 0, result.output
    newest = SidecarView.open(here.config.run_dir).read_decisions(1)[0]
    assert float(newest["shift"]) == pytest.approx(0.05)


def test_no_log_is_written_unless_asked_for(run_dir, server_class, tmp_path) -> None:
    before = set(os.listdir(tmp_path))
    Pod(run_dir, server_class, stale_ms=3.6e6).run(5)
    assert set(os.listdir(tmp_path)) == before
