"""The admin process: takes the wish, tells the world. It decides nothing.

One asyncio loop runs two HTTP servers (health on TCP, control on a unix socket), a task that looks
at the control block once per heartbeat, and a task that beats to Redis. Losing any of the outside
parts leaves the others running.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import time
from typing import Any

import numpy as np
from hbm_kube.config import KubeConfig
from hbm_kube.errors import KubeConfigError
from hbm_kube.redis_secret import RedisSecret
from hbm_policy import MoveConfig
from hbm_pool.contracts import digest as codec
from hbm_pool.contracts.records import COMMAND, INTENT

from hbm_sidecar.api import PartitionAnswer, control_app, public_app
from hbm_sidecar.artefact import Artefact, read_status
from hbm_sidecar.cluster import ClusterPartition
from hbm_sidecar.cluster_link import ABSENT_S, ClusterLink, KubeMetrics
from hbm_sidecar.cluster_status import REPORT_S, last_decision, measured, sidecar
from hbm_sidecar.config import SidecarConfig
from hbm_sidecar.contributions import prices
from hbm_sidecar.explain import explain_view, explained, wall_offset_ns
from hbm_sidecar.http_servers import http_server, serve_control
from hbm_sidecar.log import configure
from hbm_sidecar.metrics import SidecarMetrics
from hbm_sidecar.node_state import RateWindow, node_state
from hbm_sidecar.observer import Observer
from hbm_sidecar.partition import (
    DeclaredPartition,
    LocalPartition,
    ModeName,
    Partition,
    PartitionChange,
    PartitionRefused,
    PartitionSource,
    new_intent,
)
from hbm_sidecar.publisher import Beat, Publisher
from hbm_sidecar.redis_link import RedisLink
from hbm_sidecar.supervisor import ADMIN_FD


class Admin:
    """What the HTTP layer and the heartbeat see. Lives in one event loop; nothing blocks."""

    def __init__(self, config: SidecarConfig, log: Any) -> None:
        self.config = config
        self.prometheus = SidecarMetrics()
        self.observer = Observer(config.run_dir, config.stale_ms / 1e3, self.prometheus, log)
        self._log = log
        self._window = RateWindow()
        self._report_window = RateWindow(REPORT_S)
        self.cluster: ClusterLink | None = None
        self.source = self._make_source()
        self._intent = new_intent()
        self._generation = 0
        self._intent_due = True
        self._told_boot = 0
        """Which sidecar.cb has the intent: one that replaced it knows no wish."""
        self._problem_said: str | None = None
        # Time-based, so that a restarted admin never repeats a sequence.
        self._sequence = self._digest_sequence = time.time_ns() // 1_000_000
        self._digest = b""
        self._digest_version = -1
        self._digest_fault: codec.DigestReason | None = None
        self._digest_age = 0
        file = config.redis_url_file
        self.redis = RedisLink(
            config.redis_url,
            None if file is None else RedisSecret(file),
            self._publisher,
            self.prometheus,
            log,
        )

    # -- tasks -----------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Look at everything twice per heartbeat, until cancelled."""
        while True:
            self.observer.look(self.config.snapshot_refresh_s)
            self._window.add(self.observer.telemetry)
            self._report_window.add(self.observer.telemetry)
            if self.source.poll():
                self._intent_due = True
            block = self.observer.block
            if block is not None and block.boot_epoch != self._told_boot:
                self._intent_due = True
            self._say_problem()
            if self._intent_due:
                self._write_intent()
            await asyncio.sleep(self.config.heartbeat_ms / 2e3)

    def beat(self, whole: bool) -> Beat | None:
        """The next heartbeat; None while the server is not there to be routed to."""
        observer = self.observer
        if observer.server is None or not observer.server_fresh():
            self._digest_version = -1
            return None
        self._sequence += 1
        self._digest_age += 1
        changed = observer.mirror.version != self._digest_version and self._encode()
        send = whole or changed or self._digest_age >= self.config.digest_every
        if send:
            self._digest_age = 0
        state = node_state(
            observer.telemetry,
            observer.server.info,
            self._window.rates,
            name=self.config.node,
            url=self.config.address,
            sequence=self._sequence,
            unix_ms=time.time_ns() // 1_000_000,
            digest_sequence=self._digest_sequence,
            digest_crc=codec.digest_crc(self._digest),
        )
        return Beat(state, (self._digest or None) if send else None)

    # -- AdminView -------------------------------------------------------------------------------

    def partition(self) -> PartitionAnswer:
        """The wish in force."""
        return PartitionAnswer(
            partition=self.source.current(),
            owner=self.source.owner,
            problem=self.source.problem,
            generation=self._generation,
        )

    def change(self, change: PartitionChange) -> PartitionAnswer:
        """Replace the wish and write the intent at once."""
        if self.source.owner is not None:
            self.prometheus.partition_puts.labels("refused").inc()
            raise PartitionRefused(f"α is governed by {self.source.owner}; change it there")
        started = self.config.partition().model_dump()
        try:
            wanted = Partition.model_validate(started | change.model_dump(exclude_unset=True))
        except ValueError:
            self.prometheus.partition_puts.labels("invalid").inc()
            raise
        self.source.put(wanted)
        self.prometheus.partition_puts.labels("accepted").inc()
        self._log.info("partition replaced", **wanted.model_dump(mode="json"))
        self._write_intent()
        return self.partition()

    def reset(self) -> PartitionAnswer:
        """Back to the wish of the start."""
        self.source.reset()
        self._log.info("partition reset")
        self._write_intent()
        return self.partition()

    def explain(self, last: int) -> list[dict[str, Any]]:
        """The last decisions, oldest first; none while there is no file to read."""
        view = self.observer.sidecar
        return [] if view is None else explain_view(view, last)

    def policy(self) -> dict[str, Any]:
        """The parameters of the decision, by name."""
        moves = self.source.current().model_dump(include=set(MoveConfig.model_fields))
        return self.config.policy().flat() | moves

    def prices(self) -> dict[str, Any]:
        """What the twin prices with beside what the server declares."""
        return prices(self.observer.curves, self.observer.telemetry)

    def residual(self) -> dict[str, Any]:
        """What became of the learned residual that is asked for."""
        return read_status(self.config.run_dir)

    def readiness(self) -> dict[str, str]:
        """What keeps decisions from being taken, by part."""
        observer, missing = self.observer, dict(self.observer.problems)
        if not observer.server_fresh():
            missing.setdefault("server", f"telemetry is {_age(observer.telemetry_age_s())} old")
        if observer.block is None:
            missing.setdefault("sidecar.cb", "not made yet")
        limit_s = 4 * self.source.current().tick_ms / 1e3 + 1.0
        age_s = observer.decision_age_s()
        if not age_s <= limit_s and "server" not in missing:
            missing["decide"] = f"last decision is {_age(age_s)} old"
        return missing

    def metrics(self) -> bytes:
        """Prometheus text, as of now."""
        current = self.source.current().mode
        for mode in ModeName:
            self.prometheus.mode.labels(mode.value).set(mode is current)
        self.prometheus.telemetry_age.set(self.observer.telemetry_age_s())
        self.prometheus.server_up.set(self.observer.server_fresh())
        return self.prometheus.exposition()

    def state(self) -> dict[str, Any]:
        """Everything known."""
        observer, mirror = self.observer, self.observer.mirror
        info = observer.server.info if observer.server is not None else None
        command = np.zeros((), dtype=COMMAND)
        has_command = observer.sidecar is not None and observer.sidecar.read_command(command)
        publisher = self.redis.publisher
        return {
            "node": self.config.node,
            "namespace": self.config.namespace,
            "run_dir": str(self.config.run_dir),
            "partition": self.partition().model_dump(mode="json"),
            "policy": self.policy(),
            "prices": self.prices(),
            "residual": self.residual(),
            "server": {
                "fresh": observer.server_fresh(),
                "telemetry_age_s": _finite(observer.telemetry_age_s()),
                "model": info.model if info else None,
                "telemetry": _as_json(observer.telemetry),
            },
            "command": _as_json(command) if has_command else None,
            "curves": _curves_as_json(observer.curves),
            "residency": {
                "users": len(mirror),
                "exact": mirror.exact,
                "sequence": mirror.sequence,
                "gaps": mirror.gaps,
                "snapshots": mirror.snapshots,
            },
            "redis": {
                "configured": self.redis.wanted,
                "up": publisher is not None and publisher.up,
                "error": publisher.last_error if publisher else self.redis.problem,
                "digest_bytes": len(self._digest),
            },
            "children": observer.children(),
            "problems": observer.problems,
        }

    # -- internals -------------------------------------------------------------------------------

    def _make_source(self) -> PartitionSource:
        config, started = self.config, self.config.partition()
        file = config.residual_file
        artefact = None
        if file is not None:
            artefact = Artefact(file, config.residual_sha256, config.run_dir, f"at {file}")
        if config.policy_file is not None:
            return DeclaredPartition(started, config.policy_file, artefact)
        if config.kube_token_dir is None:
            return LocalPartition(started, config.run_dir, artefact)
        source = ClusterPartition(
            started,
            config.namespace,
            config.pod_name,
            config.pod_uid,
            config.policies_dir,
            config.run_dir,
        )
        try:
            kube = KubeConfig.in_cluster(config.kube_token_dir)
        except KubeConfigError as error:
            self._log.error("the Kubernetes API cannot be asked: α is held", why=str(error))
            return source
        self.cluster = ClusterLink(
            source,
            kube,
            KubeMetrics(self.prometheus.registry),
            changed=self._wish_may_have_changed,
            server_age_s=self.observer.telemetry_age_s,
            followed_ns=self._followed_ns,
            values=self._measured,
            log=self._log,
        )
        return source

    def _publisher(self, url: str) -> Publisher:
        config = self.config
        return Publisher(
            url,
            config.namespace,
            config.node,
            config.heartbeat_ms / 1e3,
            config.ttl_heartbeats * config.heartbeat_ms / 1e3,
            self.beat,
            self.prometheus,
            self._log,
        )

    def _wish_may_have_changed(self) -> None:
        """Tell decide at once: it reads the wish right before its next tick."""
        if self.source.poll():
            self._write_intent()

    def _followed_ns(self) -> int:
        """When the first decision under the wish in force was taken; 0: none has been."""
        observer = self.observer
        if self._intent_due or observer.intent_generation < self._generation:
            return 0
        return observer.intent_followed_ns

    def _measured(self) -> dict[str, Any]:
        """What the status of a partition holds, but for the conditions."""
        observer, rates = self.observer, self._report_window.rates
        values = measured(
            observer.telemetry,
            # A pause that is no absence yet does not blank the object's columns for half a minute.
            fresh=observer.telemetry_age_s() <= ABSENT_S,
            target=observer.target,
            anchor=observer.anchor,
            kv_hit_ratio=rates.kv_hit_ratio,
            emb_hit_ratio=rates.emb_hit_ratio,
        )
        if observer.last_change is not None:
            values["lastDecision"] = last_decision(
                explained(observer.last_change, wall_offset_ns())
            )
        restarts = sum(int(child["restarts"]) for child in observer.children().values())
        return values | {"sidecar": sidecar(restarts)}

    def _encode(self) -> bool:
        """Make the next digest; False: it cannot be, and the one before stays."""
        mirror, server = self.observer.mirror, self.observer.server
        assert server is not None
        resident = mirror.view()
        view = resident.most_tokens(codec.MAX_DIGEST_USERS)
        self._digest_version = mirror.version
        try:
            self._digest = codec.encode_digest(
                view.users,
                view.tokens,
                view.shard_rows,
                boot_epoch=mirror.boot_epoch,
                sequence=self._digest_sequence + 1,
                page_tokens=server.info.page_tokens,
            )
        except codec.DigestError as error:
            self.prometheus.digest_errors.inc()
            if error.reason != self._digest_fault:
                self._log.warning("digest left out, heartbeats go on", why=str(error))
            self._digest_fault = error.reason
            return False
        self.prometheus.digest_users_cut.set(len(resident.users) - len(view.users))
        self._digest_sequence += 1
        self._digest_fault = None
        return True

    def _write_intent(self) -> None:
        """Tell decide, at the next look while there is no file; once per wish."""
        observer = self.observer
        self._intent_due = True
        block, view = observer.block, observer.sidecar
        if block is None or view is None or block.boot_epoch != view.boot_epoch:
            return
        wanted = self.source.current()
        known = np.zeros((), dtype=INTENT)
        if view.read_intent(known):
            self._generation = max(self._generation, int(known["generation"]))
        residual_hash = self.source.residual_hash
        told = int(known["policy_hash"]), int(known["residual_hash"])
        if told != (wanted.policy_hash(), residual_hash) or self._generation == 0:
            self._generation += 1
            wanted.fill_intent(self._intent, self._generation, time.monotonic_ns(), residual_hash)
            block.write_intent(self._intent)
        self._intent_due, self._told_boot = False, block.boot_epoch

    def _say_problem(self) -> None:
        problem = self.source.problem
        if problem is not None and problem != self._problem_said:
            self.prometheus.policy_rejected.inc()
            self._log.warning("partition not taken over; the one before stays", why=problem)
        self._problem_said = problem


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _age(age_s: float) -> str:
    return f"{age_s:.1f} s" if math.isfinite(age_s) else "infinitely"


def _as_json(record: np.ndarray) -> dict[str, Any]:
    """Fields of a record; NaN and infinities become None."""
    fields: dict[str, Any] = {}
    for name in record.dtype.names or ():
        value = record[name].tolist()
        if isinstance(value, float):
            value = _finite(value)
        elif isinstance(value, list):
            value = [_finite(item) if isinstance(item, float) else item for item in value]
        fields[name] = value
    return fields


def _curves_as_json(curves: np.ndarray) -> dict[str, Any]:
    """Only the points that are in use."""
    points = int(curves["points"])
    fields = _as_json(curves)
    return {k: v[:points] if isinstance(v, list) else v for k, v in fields.items()}


def _write_ready_file(config: SidecarConfig, port: int) -> None:
    """Say where the sidecar serves; `pid` is the supervisor's, which stays the same."""
    if config.ready_file is None:
        return
    content = {"pid": os.getppid(), "host": config.host, "port": port, "admin_port": port}
    temporary = config.ready_file.with_name(f".{config.ready_file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content))
    temporary.rename(config.ready_file)


async def serve(config: SidecarConfig, listener: socket.socket, log: Any) -> None:
    """Run until SIGTERM, then leave Redis and return."""
    stop, control_ready = asyncio.Event(), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    admin = Admin(config, log)
    public = http_server(public_app(admin))
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(admin.watch())
        tasks = [watching, group.create_task(admin.redis.run())]
        if admin.cluster is not None:
            tasks.append(group.create_task(admin.cluster.run()))
        group.create_task(public.serve(sockets=[listener]))
        group.create_task(serve_control(control_app(admin), config, control_ready, stop, log))
        await public.listening.wait()
        await control_ready.wait()
        port = listener.getsockname()[1]
        _write_ready_file(config, port)
        log.info("admin serves", host=config.host, port=port, socket=str(config.admin_socket))
        await stop.wait()
        for task in tasks:
            task.cancel()
        await admin.redis.leave()
        public.should_exit = True


def main() -> None:
    """Entry: `python -m hbm_sidecar.admin`, with the listening socket inherited."""
    log = configure("admin")
    config = SidecarConfig()
    listener = socket.socket(fileno=int(os.environ[ADMIN_FD]))
    asyncio.run(serve(config, listener, log))


if __name__ == "__main__":
    main()
