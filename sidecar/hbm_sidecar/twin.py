"""The twin process: reads the request ring, simulates, publishes curves. It may be late.

It is niced and spends at most `twin_budget` of a core: after each bounded piece of work it sleeps
in proportion. What it is too slow for is lost in the ring, counted, and corrected for.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any, Final, NoReturn

import numpy as np
from hbm_policy import CostConstants, CostSource, Phase, RlsAdapter
from hbm_policy.twin import Twin, TwinError
from hbm_pool.contracts.control_block import (
    ControlBlockError,
    ControlBlockMissing,
    ServerView,
    SidecarBlock,
    SidecarView,
)
from hbm_pool.contracts.records import CURVES, TELEMETRY

from hbm_sidecar.config import SidecarConfig
from hbm_sidecar.log import configure

SAMPLES_PER_CYCLE: Final = 64
PUBLISH_S: Final = 0.1
"""Curves are written at most this often; decide reads the newest at each tick."""
IDLE_S: Final = 0.02
GATE_LOOK_S: Final = 0.25
"""How often it looks at the newest decision."""
REOPEN_S: Final = 0.5
REST_MAX_S: Final = 0.5
"""Compiling the kernel (seconds, where no cache is shipped) costs no minutes of rest."""
NICENESS: Final = 10


class TwinProcess:
    """One server's twin, made anew when the server is. `clock_ns` is CLOCK_MONOTONIC."""

    def __init__(
        self,
        config: SidecarConfig,
        log: Any,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        prices: CostSource | None = None,
    ) -> None:
        self._prices: CostSource = prices or RlsAdapter(config.policy().adapter)
        self._config = config
        self._log = log
        self._clock_ns = clock_ns
        self._server: ServerView | None = None
        self._block: SidecarBlock | None = None
        self._twin: Twin | None = None
        self._costs: CostConstants | None = None
        self._boot_epoch = 0
        self._telemetry = np.zeros((), dtype=TELEMETRY)
        self._curves = np.zeros((), dtype=CURVES)
        self._publish_at_ns = 0
        self._problem = ""
        self._decisions: SidecarView | None = None
        self._look_at_ns = 0
        self._burst = False

    def run(self) -> NoReturn:
        """Work in bounded pieces, for ever."""
        while True:
            began = time.thread_time()
            try:
                pause_s = self.step()
            except ControlBlockError as error:
                self._say("" if isinstance(error, ControlBlockMissing) else str(error))
                pause_s = REOPEN_S
            worked_s = time.thread_time() - began
            budget = self._config.twin_budget
            rest_s = min(REST_MAX_S, worked_s * (1.0 - budget) / budget)
            time.sleep(max(pause_s, rest_s))

    def step(self) -> float:
        """One piece of work; how long to rest at least, in seconds. Raises `ControlBlockError`."""
        if self._block is None or self._block.replaced():
            self._block = SidecarBlock.open(self._config.run_dir)
        if self._server is None:
            self._server = ServerView.open(self._config.run_dir)
        self._say("")
        server = self._server
        server.refresh()
        if server.boot_epoch != self._boot_epoch:
            self._start(server)
        if self._twin is None or not server.read_telemetry(self._telemetry):
            return IDLE_S
        self._look_at_gate()
        costs = self._prices.constants(self._telemetry, learn=not self._burst)
        self._costs = costs or self._costs
        if self._costs is None:  # the server has not measured them yet
            return IDLE_S
        samples, lost = server.read_requests(SAMPLES_PER_CYCLE)
        if samples or lost:
            self._twin.feed(samples, lost, self._costs)
        self._publish()
        return 0.0 if len(samples) == SAMPLES_PER_CYCLE else IDLE_S

    def _start(self, server: ServerView) -> None:
        """A twin of this boot; none when its server cannot be simulated."""
        self._boot_epoch = server.boot_epoch
        self._costs = None
        # What the boot before left unread is no loss of this one.
        server.read_requests(0)
        try:
            self._twin = Twin(server.info)
        except TwinError as error:
            self._twin = None
            self._log.error("this server cannot be simulated: no curves", why=str(error))
        else:
            self._log.info("twin starts", boot_epoch=server.boot_epoch, model=server.info.model)

    def _publish(self) -> None:
        now = self._clock_ns()
        twin, block = self._twin, self._block
        if now < self._publish_at_ns or twin is None or block is None or twin.requests == 0:
            return
        self._publish_at_ns = now + int(PUBLISH_S * 1e9)
        curves, costs = self._curves, self._costs
        twin.curves(curves)
        curves["boot_epoch"] = self._boot_epoch
        if costs is not None:
            curves["price_fixed_ms"], curves["price_token_ms"] = costs.fixed_ms, costs.token_ms
            curves["price_token_context_ms"] = costs.token_context_ms
            curves["price_row_ms"][: len(costs.row_ms)] = costs.row_ms
        curves["price_state"] = self._prices.state
        curves["price_batches"] = self._prices.batches
        block.write_curves(curves)

    def _look_at_gate(self) -> None:
        """Whether decide says that traffic changes: what is measured then is no price."""
        now = self._clock_ns()
        if now < self._look_at_ns:
            return
        self._look_at_ns = now + int(GATE_LOOK_S * 1e9)
        if self._decisions is None:
            self._decisions = SidecarView.open(self._config.run_dir)
        else:
            self._decisions.refresh()
        newest = self._decisions.read_decisions(1)
        self._burst = len(newest) > 0 and int(newest[0]["gate_phase"]) == Phase.BURST

    def _say(self, problem: str) -> None:
        """Once per problem; views stay as they are, so nothing is lost while a file is unusable."""
        if problem and problem != self._problem:
            self._log.warning("control block not usable", why=problem)
        self._problem = problem


def main() -> None:
    """Entry: `python -m hbm_sidecar.twin`. SIGTERM ends it at any point: there is nothing to put
    in order, and a handler would wait until a kernel is compiled."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = configure("twin")
    config = SidecarConfig()
    os.nice(NICENESS)
    TwinProcess(config, log).run()


if __name__ == "__main__":
    main()
