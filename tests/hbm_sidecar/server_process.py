"""The server's side of a control block, driven by lines of JSON on stdin.

Everything the sidecar reads is written through `ServerBlock`, and commands are taken over as a
model server does: only those of its own boot, each generation once.
"""

from __future__ import annotations

import json
import select
import sys
from pathlib import Path
from typing import Any

import numpy as np
from hbm_pool.contracts.control_block import (
    ControlBlockError,
    ServerBlock,
    SidecarView,
)
from hbm_pool.contracts.history import table_rows
from hbm_pool.contracts.identity import mix64, row_keys, sampled
from hbm_pool.contracts.records import (
    COMMAND,
    CostModel,
    RequestSample,
    ResidencySnapshot,
    RowClass,
    ServerInfo,
    TableMap,
)

PERIOD_S = 0.01
PAGE_TOKENS = 16
ITEMS = 20_000
SAMPLE_RATE = 0.1

INFO = ServerInfo(
    node="test-node",
    model="test-model",
    extents=256,
    extent_bytes=64 * 1024,
    page_tokens=PAGE_TOKENS,
    pages_per_extent=4,
    max_sequence_tokens=1024,
    drop_block_tokens=256,
    tables=(TableMap("item", ITEMS, 0, False),),
    classes=(RowClass(row_bytes=256, rows_per_extent=256, catalogue_rows=ITEMS, tables=(0,)),),
    cost_model=CostModel.SERIAL,
    sample_rate=SAMPLE_RATE,
    alpha_min=0.1,
    alpha_max=0.9,
    slo_ms=50.0,
    device="cpu",
)


class Server:
    """State behind the block."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.block = ServerBlock.create(directory, INFO)
        self.sidecar: SidecarView | None = None
        self.command = np.zeros((), dtype=COMMAND)
        self.residents: dict[int, int] = {}
        self.sequence = 0
        self.asked = 0
        self.paused = False
        self.traffic = 0
        self.rng = np.random.default_rng(seed)
        telemetry = self.block.telemetry
        telemetry["alpha"] = telemetry["alpha_target"] = 0.5
        telemetry["extents_emb"] = telemetry["extents_kv"] = 128
        telemetry["cost_fixed_ms"] = 0.3
        telemetry["cost_token_ms"] = 0.01
        telemetry["cost_row_ms"] = 0.002
        telemetry["model_version"] = 1

    def cycle(self) -> None:
        """Take over commands, answer snapshot requests, serve traffic, publish."""
        if self.sidecar is None:
            try:
                self.sidecar = SidecarView.open(self.directory)
            except ControlBlockError:
                pass
        else:
            self.sidecar.refresh()
            self._take_command(self.sidecar)
            asked = self.sidecar.snapshot_requests()
            if asked != self.asked:
                self.asked = asked
                self.snapshot()
        for _ in range(self.traffic):
            self.request()
        if not self.paused:
            self.block.publish_telemetry()

    def _take_command(self, view: SidecarView) -> None:
        telemetry, command = self.block.telemetry, self.command
        if (
            view.read_command(command)
            and command["boot_epoch"] == self.block.boot_epoch
            and command["generation"] != telemetry["command_generation"]
        ):
            if command["alpha"] != telemetry["alpha"]:
                telemetry["moves"] += np.uint64(1)
            telemetry["alpha"] = telemetry["alpha_target"] = command["alpha"]
            telemetry["extents_emb"] = round(float(command["alpha"]) * INFO.extents)
            telemetry["extents_kv"] = INFO.extents - telemetry["extents_emb"]
            telemetry["command_generation"] = command["generation"]

    def snapshot(self) -> None:
        """All of it at once."""
        shards = np.zeros(8, dtype=np.uint32)
        shards[: 1 + len(self.residents) % 8] = 5
        snapshot = ResidencySnapshot(
            boot_epoch=self.block.boot_epoch,
            sequence=self.sequence,
            users=np.array(list(self.residents), dtype=np.int64),
            tokens=np.array(list(self.residents.values()), dtype=np.uint32),
            shard_rows=shards,
        )
        for _ in self.block.write_snapshot(snapshot):
            pass

    def cached(self, user: int, tokens: int) -> None:
        """The user is resident with so many tokens; 0: evicted."""
        if tokens:
            self.residents[user] = tokens
            self.sequence = self.block.push_user_cached(user, tokens)
        else:
            self.residents.pop(user, None)
            self.sequence = self.block.push_user_evicted(user)

    def request(self) -> None:
        """One served request: a sample for the twin, counters for decide."""
        user = int(self.rng.zipf(1.3)) % 300 + 1
        history = 64 + mix64(user) % 400
        draw = np.random.default_rng(user)
        items = draw.zipf(1.2, history) % ITEMS
        candidates = self.rng.zipf(1.2, 32) % ITEMS
        keys = row_keys(0, table_rows(items, 0, ITEMS, False))
        kept = sampled(keys, SAMPLE_RATE)
        candidate_keys = row_keys(0, table_rows(candidates, 0, ITEMS, False))
        self.block.push_request(
            RequestSample(
                user=user,
                history_tokens=history,
                candidates=32,
                rows_total=history + 32,
                history_rows_total=history,
                page_fingerprints=draw.integers(0, 1 << 32, history // PAGE_TOKENS, np.uint32),
                history_keys=keys[kept],
                history_positions=np.flatnonzero(kept).astype(np.uint32),
                candidate_keys=candidate_keys[sampled(candidate_keys, SAMPLE_RATE)],
            )
        )
        hit = user in self.residents
        if not hit:
            self.cached(user, history // PAGE_TOKENS * PAGE_TOKENS)
            if len(self.residents) > 100:
                self.cached(next(iter(self.residents)), 0)
        computed = 8 if hit else history
        telemetry = self.block.telemetry
        for field, grown in (
            ("requests", 1),
            ("batches", 1),
            ("slo_total", 1),
            ("slo_met", 1),
            ("kv_lookups", 1),
            ("kv_hits", int(hit)),
            ("kv_tokens_reused", history - computed),
            ("kv_tokens_computed", computed),
            ("candidate_tokens", 32),
            ("context_tokens", computed * (2 * history - computed + 1) // 2 + 32 * history),
            ("timed_accesses", computed + 32),
            ("emb_accesses", computed + 32),
            ("emb_misses", (computed + 32) // 4),
            ("emb_hits", computed + 32 - (computed + 32) // 4),
        ):
            telemetry[field] += np.uint64(grown)
        telemetry["class_accesses"][0] = telemetry["emb_accesses"]
        telemetry["class_misses"][0] = telemetry["timed_misses"][0] = telemetry["emb_misses"]
        gather, compute = 0.002 * ((computed + 32) // 4), 0.3 + 0.01 * (computed + 32)
        telemetry["gather_ms"] += gather
        telemetry["compute_ms"] += compute
        telemetry["service_ms"] += gather + compute
        telemetry["kv_users"] = len(self.residents)
        telemetry["latency_p50_ms"], telemetry["latency_p99_ms"] = 3.0, 9.0
        telemetry["latency_n"] = telemetry["requests"]

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """One line from the test."""
        for field, value in order.get("set", {}).items():
            self.block.telemetry[field] = value
        for user, tokens in order.get("cached", []):
            self.cached(user, tokens)
        for index in range(order.get("flood", 0)):
            self.cached(1_000_000 + index % 50, index % 7 * PAGE_TOKENS)
        self.paused = order.get("paused", self.paused)
        self.traffic = order.get("traffic", self.traffic)
        telemetry = self.block.telemetry
        return {
            "boot_epoch": self.block.boot_epoch,
            "alpha": float(telemetry["alpha"]),
            "command_generation": int(telemetry["command_generation"]),
            "command_monotonic_ns": int(self.command["monotonic_ns"]),
            "moves": int(telemetry["moves"]),
            "residents": sorted(self.residents.items()),
            "sequence": self.sequence,
        }


def main() -> None:
    """Until stdin ends."""
    server = Server(Path(sys.argv[1]), int(sys.argv[2]))
    server.cycle()
    print(json.dumps(server.obey({})), flush=True)
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], PERIOD_S)
        if readable:
            line = sys.stdin.readline()
            if not line:
                return
            answer = server.obey(json.loads(line))
            server.cycle()
            print(json.dumps(answer), flush=True)
        else:
            server.cycle()


if __name__ == "__main__":
    main()
