"""Between the Kubernetes API and admin: watches this pod's HBMPartition, writes its status.

Nothing else depends on it: while the API is away, refuses us, or has no such resource any more, the
last wish stays in force; that is counted, said once, and tried again with growing pauses.
"""

from __future__ import annotations

import asyncio
import datetime
import random
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, Final

from hbm_kube.client import KubeClient
from hbm_kube.config import KubeConfig
from hbm_kube.errors import KubeError
from hbm_kube.resources import HBM_PARTITIONS, Resource
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hbm_sidecar.cluster import ClusterPartition
from hbm_sidecar.cluster_status import FIELD_MANAGER, Applied, Pacing, Report, status_of

LOOK_S: Final = 0.1
"""How often it is looked whether there is something to say."""
ABSENT_S: Final = 10.0
"""A server that was there is missed for so long before it is said."""
BACKOFF_S: Final = (1.0, 60.0)
"""First and last upper end of the pause after a write that failed."""
ATTEMPTS: Final = 2
FOLLOWED_BUCKETS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0)


class KubeMetrics:
    """`hbm_sidecar_kube_*` (rows in docs/metrics-sidecar.md)."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "hbm_sidecar_kube"
        self.up = Gauge(
            f"{prefix}_up", "1 while the watch of the partition stands.", registry=registry
        )
        self.requests = Counter(
            f"{prefix}_requests",
            "Requests to the Kubernetes API; code 0: no answer.",
            ("verb", "code"),
            registry=registry,
        )
        self.failures = Counter(
            f"{prefix}_failures",
            "Watches and writes that failed.",
            ("operation",),
            registry=registry,
        )
        for operation in ("watch", "status"):
            self.failures.labels(operation)
        self.reports = Counter(
            f"{prefix}_reports",
            "Status writes by what made them due.",
            ("cause",),
            registry=registry,
        )
        self.generation = Gauge(
            f"{prefix}_generation",
            "Generation of the partition looked at last; 0: there is none.",
            registry=registry,
        )
        self.applied = Gauge(
            f"{prefix}_applied", "1 while that generation is followed.", registry=registry
        )
        self.foreign = Counter(
            f"{prefix}_foreign_partitions",
            "Partitions of our name that belong to another pod.",
            registry=registry,
        )
        self.followed = Histogram(
            f"{prefix}_followed_seconds",
            "A generation observed to the first decision that follows it.",
            buckets=FOLLOWED_BUCKETS_S,
            registry=registry,
        )


class Outage:
    """Says once that something fails, and once that it works again."""

    def __init__(self, what: str, log: Any) -> None:
        self._what = what
        self._log = log
        self.count = 0
        """Failures in a row."""

    def failed(self, error: Exception) -> None:
        """Once more."""
        self.count += 1
        if self.count == 1:
            self._log.warning(f"{self._what}: trying again; decisions go on", why=str(error))

    def works(self) -> None:
        """It does."""
        if self.count:
            self._log.info(f"{self._what}: works again", failures=self.count)
        self.count = 0


class ClusterLink:
    """Runs for as long as admin does.

    Args:
        source: told of what the API says.
        config: the API server and our identity.
        metrics: counted into.
        changed: called as soon as the wish is another one.
        server_age_s: age of the newest telemetry.
        followed_ns: monotonic time of the first decision under the wish in force, 0 while none.
        values: measured values of now, by their names in the status.
        log: structured logger.
    """

    def __init__(
        self,
        source: ClusterPartition,
        config: KubeConfig,
        metrics: KubeMetrics,
        *,
        changed: Callable[[], None],
        server_age_s: Callable[[], float],
        followed_ns: Callable[[], int],
        values: Callable[[], dict[str, Any]],
        log: Any,
    ) -> None:
        self._source = source
        self._config = config
        self._metrics = metrics
        self._changed = changed
        self._server_age_s = server_age_s
        self._followed_ns = followed_ns
        self._values = values
        self._log = log
        self._pacing = Pacing(random.Random())
        self._watching = Outage("watching the partition fails", log)
        self._writing = Outage("writing the partition's status fails", log)
        self._uid = ""
        self._timed = (source.uid, source.generation)
        """Which generation's way to its first decision has been measured: not one of before us."""

    async def run(self) -> None:
        """Watch and report until cancelled."""
        async with (
            KubeClient(
                self._config, on_request=self._count, attempts=ATTEMPTS, user_agent="hbm-sidecar"
            ) as kube,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(self._watch(kube))
            group.create_task(self._report(kube))

    # -- watch -----------------------------------------------------------------------------------

    async def _watch(self, kube: KubeClient) -> None:
        source = self._source
        events = kube.watch(
            HBM_PARTITIONS, source.namespace, name=source.pod, on_failure=self._watch_failed
        )
        listed = False
        async with aclosing(events):
            async for event in events:
                self._watching.works()
                self._metrics.up.set(1)
                match event.type:
                    case "ADDED" | "MODIFIED":
                        listed = True
                        if not source.observe(event.object):
                            self._metrics.foreign.inc()
                    case "DELETED":
                        source.vanished(event.object["metadata"]["uid"])
                    case "SYNCED":
                        if not listed:
                            source.vanished()
                        listed = True
                self._metrics.generation.set(source.generation)
                self._changed()

    def _watch_failed(self, error: KubeError) -> None:
        self._metrics.up.set(0)
        self._metrics.failures.labels("watch").inc()
        self._watching.failed(error)

    # -- report ----------------------------------------------------------------------------------

    async def _report(self, kube: KubeClient) -> None:
        not_before = 0.0
        while True:
            await asyncio.sleep(LOOK_S)
            self._time_generation()
            now = time.monotonic()
            if now < not_before:
                continue
            try:
                await self._report_if_due(kube, now)
            except KubeError as error:
                self._metrics.failures.labels("status").inc()
                self._writing.failed(error)
                first, last = BACKOFF_S
                ceiling = min(first * 2.0 ** min(self._writing.count, 16), last)
                pause = (error.retry_after_s or 0.0) + random.uniform(ceiling / 2, ceiling)
                not_before = time.monotonic() + pause

    async def _report_if_due(self, kube: KubeClient, now: float) -> None:
        source = self._source
        if source.uid != self._uid:
            self._uid = source.uid
            self._pacing.forget()
        applied = self.applied()
        self._metrics.applied.set(source.generation > 0 and applied.status == "True")
        if source.generation == 0:
            return
        report = Report(source.generation, applied, self._values())
        cause = self._pacing.due(report, now)
        if not cause:
            return
        wall = datetime.datetime.now(datetime.UTC)
        status = status_of(report, source.condition, wall)
        await kube.apply(
            HBM_PARTITIONS,
            {
                # That it is the status of our own pod is checked by the admission policy: an apply
                # to a status cannot name the object's uid (the server ignores it).
                "metadata": {"name": source.pod, "namespace": source.namespace},
                "status": status,
            },
            field_manager=FIELD_MANAGER,
            subresource="status",
        )
        source.condition = status["conditions"][0]
        self._pacing.told(report, now)
        self._writing.works()
        self._metrics.reports.labels(cause).inc()

    def applied(self) -> Applied:
        """Whether the newest generation is followed, and if not, why."""
        source = self._source
        if source.verdict.reason:
            return Applied("False", source.verdict.reason, source.verdict.message)
        age_s = self._server_age_s()
        if age_s > ABSENT_S:
            return Applied(
                "False",
                "ServerAbsent",
                "no model server speaks in the shared directory; the spec is followed as soon as "
                "one does",
            )
        if not self._followed_ns():
            return Applied("False", "Pending", "no decision has followed this spec yet")
        message = source.verdict.message or "decisions follow this spec"
        return Applied("True", "Applied", message)

    def _time_generation(self) -> None:
        source = self._source
        seen = (source.uid, source.generation)
        if seen == self._timed or source.generation == 0:
            return
        followed_ns = self._followed_ns()
        if followed_ns:
            self._timed = seen
            self._metrics.followed.observe(max(0, followed_ns - source.observed_ns) / 1e9)

    def _count(self, verb: str, _: Resource, code: int, __: float) -> None:
        self._metrics.requests.labels(verb, str(code)).inc()
