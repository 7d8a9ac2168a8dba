"""How decide meets a tick: rehearsals before it, one decision when it is due."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
from hbm_pool.contracts.control_block import SidecarBlock, SidecarView
from hbm_pool.contracts.records import COMMAND, INTENT
from hbm_sidecar.config import SidecarConfig
from hbm_sidecar.decide import LEAD_MAX_NS, LEAD_MIN_NS, Decider, Metronome
from hbm_sidecar.log import configure


def test_rehearsals_leave_no_trace_and_end_when_the_tick_is_due(
    server_class, run_dir: Path
) -> None:
    config = SidecarConfig(run_dir=run_dir, mode="fixed", alpha_fixed=0.4)
    intent = np.zeros((), dtype=INTENT)
    config.partition().fill_intent(intent, generation=1, monotonic_ns=1)
    SidecarBlock.create(run_dir).write_intent(intent)
    server_class(run_dir, seed=1).cycle()
    view = SidecarView.open(run_dir)
    # Each look at this clock takes a microsecond.
    clock_ns = itertools.count(time.monotonic_ns(), 1_000).__next__
    decider = Decider(config, configure("test"), clock_ns)
    metronome = Metronome(decider, clock_ns)
    for _ in range(20):
        decider.prepare()
        decider.dry()
    assert len(view.read_decisions(10)) == 0
    assert not view.read_command(np.zeros((), dtype=COMMAND))
    for met in range(1, 21):
        metronome.meet(clock_ns() + metronome.lead_ns)
        assert len(view.read_decisions(100)) == met
        assert metronome.rehearsed_ns > 0
    assert view.read_command(np.zeros((), dtype=COMMAND))
    # The last tick spun no longer than it had to and did not come late.
    newest = view.read_decisions(1)[0]
    assert 0.0 <= newest["due_us"] <= newest["latency_us"] + 10.0
    assert LEAD_MIN_NS <= metronome.lead_ns <= LEAD_MAX_NS
