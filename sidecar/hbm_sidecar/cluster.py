"""The wish as a Kubernetes object: the `HBMPartition` of this pod.

What the API says comes in by `observe`. The last wish that was taken over is kept in the run
directory, so that neither an outage of the API nor a restart changes what is decided. Without a
partition α is held.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from hbm_sidecar.artefact import Artefact, Verdict
from hbm_sidecar.partition import ModeName, Partition, PartitionRefused, SidecarError

KEPT_FILE: Final = "cluster-partition.json"
_MAX_REFILL: Final = 1e12
_QUANTITY: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)")
_DECIMAL: Final = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_PATHS: Final = {
    "mode": "mode",
    "alpha_min": "alpha.min",
    "alpha_max": "alpha.max",
    "alpha_fixed": "alpha.fixed",
    "alpha_initial": "alpha.initial",
    "slo_ms": "slo.latencyMs",
    "tick_ms": "tickMilliseconds",
    "refill_bytes_per_s": "refill.maxBytesPerSecond",
    "slew_per_s": "moves.slewPerSecond",
    "move_fraction": "moves.fraction",
    "min_change": "moves.minChange",
    "dwell_ms": "moves.dwellSeconds",
}
"""Where each field of a `Partition` stands in the spec."""


class SpecRefused(SidecarError):
    """A spec that cannot be followed; the text names the field as it stands in the object."""


def bytes_of(quantity: object) -> float:
    """Bytes of a Kubernetes quantity: `256Mi`, `1.5G`, 4096. Raises `ValueError`."""
    found = _QUANTITY.fullmatch(str(quantity))
    if found is None:
        raise ValueError(f"{quantity!r} is no quantity; write for example 256Mi")
    number, suffix = found.groups()
    base = 1024.0 if suffix.endswith("i") else 1000.0
    return float(number) * base ** _DECIMAL[suffix.removesuffix("i")]


def wish_of(spec: Mapping[str, Any], started: Partition) -> Partition:
    """The wish that a spec of an HBMPartition states; what it leaves out is as `started`.

    Fields that this version does not know are left alone. Raises `SpecRefused`.
    """
    wanted: dict[str, Any] = {}
    for name, path in _PATHS.items():
        value: Any = spec
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            wanted[name] = value
    wanted.setdefault("mode", ModeName.HOLD)
    try:
        if "dwell_ms" in wanted:
            wanted["dwell_ms"] = float(wanted["dwell_ms"]) * 1e3
        if "refill_bytes_per_s" in wanted:
            wanted["refill_bytes_per_s"] = min(bytes_of(wanted["refill_bytes_per_s"]), _MAX_REFILL)
        return Partition.model_validate(started.model_dump() | wanted)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = _PATHS.get(str(first["loc"][0]), "spec") if first["loc"] else "spec"
        reason = str(first["msg"]).removeprefix("Value error, ")
        for name in ("alpha_min", "alpha_max", "alpha_fixed"):
            reason = reason.replace(name, _PATHS[name])
        raise SpecRefused(f"spec.{field}: {reason}") from error
    except (ValueError, TypeError) as error:
        raise SpecRefused(f"spec: {error}") from error


class ClusterPartition:
    """A `PartitionSource` that an API object governs; PUT is refused and names it.

    Args:
        started: fills up what a spec leaves out.
        namespace: of the pod.
        pod: its name, which is that of the partition.
        pod_uid: a partition of another uid is not ours, whatever its name.
        policies_dir: where the ConfigMap of learned policies is mounted, or will be.
        run_dir: keeps the last wish.
        clock_ns: CLOCK_MONOTONIC.
    """

    def __init__(
        self,
        started: Partition,
        namespace: str,
        pod: str,
        pod_uid: str,
        policies_dir: Path,
        run_dir: Path,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.started = started
        self.namespace = namespace
        self.pod = pod
        self.pod_uid = pod_uid
        self.generation = 0
        """Of the spec that was looked at last; 0: there is no partition."""
        self.uid = ""
        """Of the partition itself."""
        self.observed_ns = 0
        """When that generation was first seen."""
        self.foreign_uid = ""
        """Uid of the pod that a partition of our name belongs to, if not to ours."""
        self.verdict = Verdict("", "")
        self.condition: Mapping[str, Any] = {}
        """`Applied` as it stands in the object."""
        self._policies_dir = policies_dir
        self._kept = run_dir / KEPT_FILE
        self._clock_ns = clock_ns
        self._hold = started.model_copy(update={"mode": ModeName.HOLD})
        self._current = self._hold
        self.residual_hash = 0
        self._artefact: Artefact | None = None
        self._news = False
        self._not_kept = ""
        self._recall()

    # -- PartitionSource -------------------------------------------------------------------------

    @property
    def owner(self) -> str:
        """The object, by name, and that it is not there, if so."""
        name = f"HBMPartition {self.namespace}/{self.pod}"
        if self.foreign_uid:
            return f"{name} (which is that of another pod, uid {self.foreign_uid}: α is held)"
        return name if self.generation else f"{name} (there is none yet: α is held)"

    @property
    def problem(self) -> str | None:
        """Why the newest spec is not wholly in force."""
        if self.verdict.reason:
            return f"{self.verdict.reason}: {self.verdict.message}"
        return self._not_kept or None

    def current(self) -> Partition:
        """The wish in force."""
        return self._current

    def poll(self) -> bool:
        """Look at the artefact; True once after the wish has changed."""
        if self._artefact is not None and self.verdict.reason != "SpecRefused":
            self._look()
        news, self._news = self._news, False
        return news

    def put(self, partition: Partition) -> None:
        """Always refused."""
        raise PartitionRefused(f"α is governed by {self.owner}; change its HBMPolicy")

    def reset(self) -> None:
        """Always refused."""
        raise PartitionRefused(f"α is governed by {self.owner}; change its HBMPolicy")

    # -- the API ---------------------------------------------------------------------------------

    def observe(self, found: Mapping[str, Any]) -> bool:
        """An object of our name was seen. False: it is another pod's, and ignored."""
        spec = found.get("spec") or {}
        uid = (spec.get("podRef") or {}).get("uid")
        if uid != self.pod_uid:
            self.foreign_uid = str(uid)
            self._forget()
            return False
        self.foreign_uid = ""
        metadata = found["metadata"]
        conditions = (found.get("status") or {}).get("conditions") or ()
        self.condition = next((c for c in conditions if c.get("type") == "Applied"), {})
        seen = (metadata["uid"], int(metadata["generation"]))
        if seen != (self.uid, self.generation):
            self.uid, self.generation = seen
            self.observed_ns = self._clock_ns()
            self._take(spec)
            self._keep(spec)
        return True

    def vanished(self, uid: str | None = None) -> None:
        """There is no object of our name (any more). `uid`: only if it was this one."""
        if uid in (None, self.uid) or self.generation == 0:
            self.foreign_uid = ""
            self._forget()

    # -- internals -------------------------------------------------------------------------------

    def _take(self, spec: Mapping[str, Any]) -> None:
        try:
            wanted = wish_of(spec, self.started)
        except SpecRefused as error:
            self.verdict = Verdict("SpecRefused", f"{error}; what was asked before stays in force")
            return
        self.verdict = Verdict("", "")
        self._take_artefact(spec.get("artefact"))
        self._follow(wanted)

    def _take_artefact(self, asked: Mapping[str, Any] | None) -> None:
        self._artefact = None
        if not asked:
            self._use(0)
            return
        key, sha256 = str(asked.get("key")), str(asked.get("sha256"))
        self._artefact = Artefact.of_key(self._policies_dir, key, sha256, self._kept.parent)
        if self._artefact is None:
            self.verdict = Verdict(
                "ArtefactInvalid", f"artefact key {key!r} is no key of a ConfigMap"
            )
        else:
            self._look()

    def _look(self) -> None:
        """At the artefact; until there is one, what was used before stays in use."""
        assert self._artefact is not None
        self.verdict = self._artefact.look()
        self._use(self._artefact.hash or self.residual_hash)

    def _use(self, residual_hash: int) -> None:
        self._news = self._news or residual_hash != self.residual_hash
        self.residual_hash = residual_hash

    def _follow(self, wanted: Partition) -> None:
        self._news = self._news or wanted != self._current
        self._current = wanted

    def _forget(self) -> None:
        """No partition: α is held where it is."""
        self.generation, self.uid, self.condition = 0, "", {}
        self.verdict, self._artefact = Verdict("", ""), None
        self._use(0)
        self._follow(self._hold)
        try:
            self._kept.unlink(missing_ok=True)
        except OSError as error:
            self._not_kept = f"{self._kept} cannot be removed ({error.strerror})"

    def _keep(self, spec: Mapping[str, Any]) -> None:
        if self.verdict.reason == "SpecRefused":
            return
        content = {
            "podUid": self.pod_uid,
            "uid": self.uid,
            "generation": self.generation,
            "spec": spec,
        }
        temporary = self._kept.with_name(f".{self._kept.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(content))
            temporary.rename(self._kept)
        except OSError as error:
            self._not_kept = f"{self._kept} cannot be written ({error.strerror})"
        else:
            self._not_kept = ""

    def _recall(self) -> None:
        """The wish of before a restart; anything odd about it is as if it were not there."""
        try:
            content = json.loads(self._kept.read_bytes())
            if content["podUid"] != self.pod_uid:
                return
            self.uid, self.generation = str(content["uid"]), int(content["generation"])
            self.observed_ns = self._clock_ns()
            self._take(content["spec"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._forget()
