"""`hbm_sidecar_*`: what admin exposes for all three processes (rows in docs/metrics-sidecar.md)."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCY_BUCKETS_S: Final = (
    4e-6, 8e-6, 12e-6, 16e-6, 24e-6, 32e-6, 48e-6, 64e-6, 128e-6, 256e-6, 512e-6, 1e-3, 4e-3, 16e-3,
)  # fmt: skip


class SidecarMetrics:
    """One registry with everything in it; label sets are bounded."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"hbm_sidecar_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"hbm_sidecar_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(
                f"hbm_sidecar_{name}", text, buckets=LATENCY_BUCKETS_S, registry=registry
            )

        # Decisions.
        self.decision_latency = histogram(
            "decision_latency_seconds", "First read of telemetry to command sequence stored."
        )
        self.decision_due = histogram(
            "decision_due_seconds", "Tick due to command sequence stored."
        )
        self.decisions = counter("decisions", "Decisions taken.")
        self.decision_reasons = counter("decision_reasons", "Decisions that state it.", ("reason",))
        self.moves = counter("moves", "Moves of α started and commanded.")
        self.decisions_unseen = counter(
            "decisions_unseen", "Decisions overwritten before admin read them."
        )
        self.alpha = gauge("alpha", "Applied α, as last read by decide.")
        self.anchor = gauge("alpha_anchor", "Anchor α̂; NaN while unknown.")
        self.target = gauge("alpha_target", "α asked of the server.")
        self.gain = gauge("predicted_gain_ratio", "Predicted saving at the anchor.")
        self.mode = gauge("mode", "1 for the mode in force.", ("mode",))
        # What decisions rest on.
        self.telemetry_age = gauge("telemetry_age_seconds", "Age of the server's telemetry.")
        self.server_up = gauge("server_up", "1 while telemetry is fresh.")
        self.server_boots = counter("server_boots", "Server boots seen.")
        self.curve_age = gauge("twin_curve_age_seconds", "Age of the twin's curves.")
        self.twin_requests = counter("twin_requests", "Requests simulated by the twin.")
        self.twin_warm = gauge("twin_warm_ratio", "Share of the virtual caches that is filled.")
        self.ring_lost = counter("ring_requests_lost", "Samples the twin did not get.")
        self.block_errors = counter(
            "control_block_errors", "Control block files refused.", ("file",)
        )
        for file in ("server.cb", "sidecar.cb"):
            self.block_errors.labels(file)  # 0 until the first: an increase from nothing is unseen
        # Residency.
        self.residency_users = gauge("residency_users", "Users mirrored as resident.")
        self.residency_exact = gauge("residency_exact", "0 from a gap until the next snapshot.")
        self.residency_gaps = counter("residency_gaps", "Gaps in the residency ring.")
        self.snapshots_asked = counter("residency_snapshots_requested", "Snapshots asked for.")
        self.snapshots_taken = counter("residency_snapshots_taken", "Snapshots taken over.")
        # Redis.
        self.redis_configured = gauge("redis_configured", "1 once there is an address of Redis.")
        self.redis_up = gauge("redis_up", "1 while the last heartbeat was stored.")
        self.redis_errors = counter("redis_errors", "Heartbeats that could not be stored.")
        self.heartbeats = counter("heartbeats", "Heartbeats stored.")
        self.digest_bytes = gauge("digest_bytes", "Size of the newest digest.")
        self.digest_users_cut = gauge("digest_users_cut", "Users left out of the newest digest.")
        self.digests = counter("digests", "Digests stored.")
        self.digest_errors = counter("digest_errors", "Digests that could not be encoded.")
        # House.
        self.child_restarts = counter("child_restarts", "Restarts by the supervisor.", ("child",))
        self.policy_rejected = counter("policy_rejected", "Policy file contents refused.")
        self.partition_puts = counter(
            "partition_puts", "PUT /v1/partition by outcome.", ("outcome",)
        )

    def exposition(self) -> bytes:
        """Text format 0.0.4."""
        return generate_latest(self.registry)
