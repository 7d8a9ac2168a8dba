"""The decide process: one thread, one decision per tick, nothing else.

A decision is: read telemetry, ask the policy, store the command. What can be done beforehand is:
files are opened and remapped, intent and curves are read, and three whole dry decisions are run
right before the tick so that code and data are in the caches (one decision every 250 ms otherwise
costs twenty times as much). The garbage collector is frozen and off: nothing here makes cycles.
"""

from __future__ import annotations

import functools
import gc
import signal
import struct
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from hbm_policy import (
    Decision,
    Intake,
    MoveConfig,
    Policy,
    PolicyState,
    Reason,
    ShieldConfig,
)
from hbm_pool.contracts.control_block import (
    ControlBlockError,
    ControlBlockMissing,
    ServerView,
    SidecarBlock,
    SidecarView,
    StampedWriter,
)
from hbm_pool.contracts.record_slots import slots_bytes
from hbm_pool.contracts.records import COMMAND, CURVES, INTENT, TELEMETRY
from pydantic import ValidationError

from hbm_sidecar.artefact import ResidualSlot
from hbm_sidecar.config import SidecarConfig
from hbm_sidecar.decision_log import DecisionLog
from hbm_sidecar.log import configure
from hbm_sidecar.pace import Pace
from hbm_sidecar.signals import SignalWait

DRY_DECISIONS: Final = 3
WARM_UP_DECISIONS: Final = 300
LEAD_MIN_NS: Final = 300_000
LEAD_MAX_NS: Final = 5_000_000
"""How long before the tick it wakes: getting ready must fit in, what is left is spun away."""
TICK_MIN_MS: Final = 10.0
TICK_MAX_MS: Final = 60_000.0
_DEAD: Final = int(
    Reason.NO_TELEMETRY
    | Reason.TELEMETRY_STALE
    | Reason.TELEMETRY_INVALID
    | Reason.CLOCK_BACKWARDS
    | Reason.EPOCH_MISMATCH
)
"""Said once, not once per tick: the log of decisions is for decisions."""


def _contributions(decision: Decision) -> tuple[float, ...]:
    """What each layer added, in the order of DECISION's last fields."""
    gating, correction = decision.gating, decision.correction
    return (
        gating.phase,
        gating.cost_level,
        gating.arrivals_level,
        correction.alpha,
        correction.fraction_scale,
        correction.slew_scale * gating.slew_scale,
        decision.wish,
        decision.state.goal,
    )


def _packer(record: npt.NDArray[Any]) -> Callable[..., None]:
    """Packs all fields of a record behind its stamp at once.

    A sixth of the cost of numpy field by field. The buffer is taken once: asking a structured array
    for it costs as much as the packing.
    """
    dtype, codes = record.dtype, {"<i8": "q", "<u8": "Q", "<f8": "d"}
    assert dtype.names is not None
    assert dtype.names[0] == "monotonic_ns"
    layout = struct.Struct("<" + "".join(codes[dtype[name].str] for name in dtype.names[1:]))
    assert layout.size + 8 == dtype.itemsize
    return functools.partial(layout.pack_into, record.reshape(1).view(np.uint8).data, 8)


class Decider:
    """State of the process. `clock_ns` is CLOCK_MONOTONIC in nanoseconds."""

    def __init__(
        self, config: SidecarConfig, log: Any, clock_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.period_ns = int(config.tick_ms * 1e6)
        self._run_dir = config.run_dir
        self._parameters = config.policy()
        self._log = log
        gain = self._parameters.residual.residual_gain
        self._residual = ResidualSlot(config.run_dir, gain, log)
        self._policy = Policy(self._parameters)
        self._clock_ns = clock_ns
        self._telemetry = np.zeros((), dtype=TELEMETRY)
        self._intent = np.zeros((), dtype=INTENT)
        self._curves = np.zeros((), dtype=CURVES)
        self._wish_hash = 0
        self._wish_generation = 0
        self._known_intent: npt.NDArray[Any] | None = None
        self._known_curves: npt.NDArray[Any] | None = None
        self._intake: Intake | None = None
        self._state = PolicyState()
        self._server: ServerView | None = None
        self._wishes: SidecarView | None = None
        self._block: SidecarBlock | None = None
        # Dry decisions store their command where nobody reads it, by the same code.
        self._dry_writer = StampedWriter(memoryview(bytearray(slots_bytes(COMMAND))), COMMAND)
        self._pack_dry = _packer(self._dry_writer.record)
        self._pack_command = self._pack_decision = self._pack_dry
        self._said_dead = 0
        self._problems: dict[str, str] = {}
        self._record: DecisionLog | None = None
        if config.decision_log is not None:
            self._record = DecisionLog(config.decision_log, config.decision_log_bytes, log)

    # -- before the tick -------------------------------------------------------------------------

    def prepare(self) -> None:
        """Open and follow the files; take over intent and curves. Never raises for bad files."""
        self._follow("sidecar.cb", self._prepare_own)
        self._follow("server.cb", self._prepare_server)

    def dry(self) -> None:
        """A whole decision whose outcome is thrown away: all of a tick's code up to its command."""
        server = self._server
        if server is None or self._intake is None:
            return
        self._carry_out(server, self._pack_dry, self._dry_writer.publish, self._dry_writer.record)

    def _carry_out(
        self,
        server: ServerView,
        pack: Callable[..., None],
        write: Callable[[npt.NDArray[Any]], None],
        record: npt.NDArray[Any],
    ) -> tuple[Decision, int, int]:
        """Decide and write the command: the decision, when it began and when that was stored."""
        clock_ns = self._clock_ns
        began_ns = clock_ns()
        decision = self._decide(server, began_ns)
        if decision.apply:
            pack(
                server.boot_epoch,
                decision.generation,
                decision.target,
                decision.refill_bytes_per_s,
                decision.drop_only,
            )
            write(record)
        return decision, began_ns, clock_ns()

    def _decide(self, server: ServerView, now_ns: int) -> Decision:
        """Read telemetry and ask the policy."""
        intake = self._intake
        assert intake is not None  # it comes with the server
        server.read_telemetry(self._telemetry)
        reading = intake.reading(
            now_ns, server.boot_epoch, self._telemetry, self._known_intent, self._known_curves
        )
        return self._policy.decide(reading, self._state)

    def _follow(self, file: str, prepare: Callable[[], None]) -> None:
        try:
            prepare()
        except ControlBlockError as error:
            text = "" if isinstance(error, ControlBlockMissing) else str(error)
            if text and self._problems.get(file) != text:
                self._log.warning("control block not usable: nothing is decided", why=text)
            self._problems[file] = text
        else:
            if self._problems.pop(file, ""):
                self._log.info("control block usable", file=file)

    def _prepare_own(self) -> None:
        wishes, block = self._wishes, self._block
        if wishes is None:
            self._wishes = wishes = SidecarView.open(self._run_dir)
        else:
            wishes.refresh()
        # Each side is followed by itself: one may fail where the other has succeeded.
        if block is None or block.replaced():
            self._attach(SidecarBlock.open(self._run_dir), wishes.read_decisions(1))
        if wishes.read_intent(self._intent):
            self._known_intent = self._intent
            self._take_wish()
            wished_ms = float(self._intent["tick_ms"])
            if TICK_MIN_MS <= wished_ms <= TICK_MAX_MS:
                self.period_ns = int(wished_ms * 1e6)
        if wishes.read_curves(self._curves):
            self._known_curves = self._curves

    def _take_wish(self) -> None:
        """Follow another wish. The price of moves is a parameter of the policy, which keeps no
        state: another one goes on where it was."""
        self._wish_generation = int(self._intent["generation"])
        if self._residual.follow(int(self._intent["residual_hash"])):
            self._policy = Policy(self._policy.config, residual=self._residual.residual)
        if int(self._intent["policy_hash"]) == self._wish_hash:
            return
        self._wish_hash = int(self._intent["policy_hash"])
        moves = {name: float(self._intent[name]) for name in MoveConfig.model_fields}
        shield = self._parameters.shield.model_dump() | moves
        try:
            wished = self._parameters.model_copy(update={"shield": ShieldConfig(**shield)})
        except ValidationError as error:
            self._log.warning("price of moves not taken over", why=str(error))
            return
        self._policy = Policy(wished, residual=self._residual.residual)

    def _attach(self, block: SidecarBlock, newest: npt.NDArray[Any]) -> None:
        """Go on where the process before this one ended: generations and ticks only grow.

        `newest`: the newest decision in the log, or none.
        """
        self._block = block
        self._pack_command = _packer(block.command)
        self._pack_decision = _packer(block.decision)
        self._state = self._state._replace(
            generation=max(self._state.generation, int(block.command["generation"])),
            tick=max(self._state.tick, *newest["tick"].tolist(), 0),
        )

    def _prepare_server(self) -> None:
        if self._server is None:
            self._server = ServerView.open(self._run_dir)
        elif not self._server.refresh():
            return
        self._intake = Intake(self._server.info)
        self._telemetry[()] = np.zeros((), dtype=TELEMETRY)
        self._log.info("server seen", boot_epoch=self._server.boot_epoch)

    # -- the tick --------------------------------------------------------------------------------

    def tick(self, due_ns: int) -> None:
        """One decision. Nothing happens while there is no file to write to, or no server."""
        server, block = self._server, self._block
        if server is None or block is None or self._intake is None:
            return
        decision, began_ns, stored_ns = self._carry_out(
            server, self._pack_command, block.write_command, block.command
        )
        if self._record is not None:
            self._keep(self._record, server, decision, began_ns)
        self._state = decision.state
        dead = decision.reasons & _DEAD
        if dead and dead == self._said_dead:
            return
        self._said_dead = dead
        self._pack_decision(
            decision.generation if decision.apply else 0,
            self._wish_generation,
            decision.tick,
            decision.alpha,
            decision.anchor,
            decision.target,
            decision.refill_bytes_per_s,
            decision.reasons,
            (stored_ns - began_ns) / 1e3,
            (stored_ns - due_ns) / 1e3,
            decision.gain,
            decision.mode,
            *_contributions(decision),
        )
        block.push_decision(block.decision)

    def _keep(
        self, record: DecisionLog, server: ServerView, decision: Decision, began_ns: int
    ) -> None:
        """The reading is made again: telemetry, intent and curve lie where they were read."""
        assert self._intake is not None
        reading = self._intake.reading(
            began_ns, server.boot_epoch, self._telemetry, self._known_intent, self._known_curves
        )
        record.add(self._policy, self._residual.used, self._state, reading, decision)


class Metronome:
    """Wakes shortly before each tick, prepares, runs dry, and decides when it is due.

    Dry decisions end when the tick is due, not when it woke: in between caches cool down again.
    `dry`: how many.
    """

    def __init__(
        self,
        decider: Decider,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        dry: int = DRY_DECISIONS,
    ) -> None:
        self._decider = decider
        self._clock_ns = clock_ns
        self._dry = dry
        self._ready_ns = LEAD_MIN_NS
        self._rehearsal_ns = 0
        self.rehearsed_ns = 0
        """What the dry decisions before the newest tick took, together."""

    @property
    def lead_ns(self) -> int:
        """How long before a tick to wake."""
        lead_ns = 2 * (self._ready_ns + self._rehearsal_ns)
        return min(LEAD_MAX_NS, max(LEAD_MIN_NS, lead_ns))

    def run(self) -> None:
        """Until SIGTERM, which must be blocked: it is waited for instead of slept."""
        clock_ns, decider = self._clock_ns, self._decider
        pace = Pace(clock_ns(), decider.period_ns)
        asked_to_end = SignalWait((signal.SIGTERM,))
        while True:
            sleep_s = max(0.0, (pace.due_ns - self.lead_ns - clock_ns()) / 1e9)
            if asked_to_end.take(sleep_s):
                return
            self.meet(pace.due_ns)
            pace.change(clock_ns(), decider.period_ns)
            pace.advance(clock_ns())

    def meet(self, due_ns: int) -> None:
        """Get ready, spin until the dry decisions fit in exactly, run them, decide at `due_ns`."""
        clock_ns, decider = self._clock_ns, self._decider
        woke_ns = clock_ns()
        decider.prepare()
        self._ready_ns += (clock_ns() - woke_ns - self._ready_ns) // 4
        while clock_ns() < due_ns - self._rehearsal_ns:
            pass
        began_ns = clock_ns()
        for _ in range(self._dry):
            decider.dry()
        self.rehearsed_ns = clock_ns() - began_ns
        self._rehearsal_ns += (self.rehearsed_ns - self._rehearsal_ns) // 4
        while clock_ns() < due_ns:
            pass
        decider.tick(due_ns)


def main() -> None:
    """Entry: `python -m hbm_sidecar.decide`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    decider = Decider(SidecarConfig(), configure("decide"))
    decider.prepare()
    for _ in range(WARM_UP_DECISIONS):
        decider.dry()
    gc.collect()
    gc.freeze()
    gc.disable()
    Metronome(decider).run()


if __name__ == "__main__":
    main()
