"""Configuration of the sidecar: flags, and the environment with prefix HBM_ by the same names."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from hbm_policy import (
    AdapterConfig,
    AnchorConfig,
    GateConfig,
    PolicyConfig,
    ResidualConfig,
    ShieldConfig,
)
from hbm_pool.contracts.names import check_name
from pydantic import BaseModel, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from hbm_sidecar.partition import Partition

ENV_PREFIX: Final = "HBM_"
ADMIN_SOCKET: Final = "admin.sock"
_REDIS_SCHEMES = ("redis", "rediss", "unix")
_MAX_SOCKET_PATH = 107  # sun_path of Linux without its terminating zero


class SidecarConfig(
    Partition,
    AnchorConfig,
    ShieldConfig,
    GateConfig,
    AdapterConfig,
    ResidualConfig,
    BaseSettings,
):
    """All settings of `hbm sidecar`.

    The fields of `Partition` are the wish it starts with, those of the other configurations the
    parameters of the decision.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", frozen=True)

    run_dir: Path = Field(
        Path("/run/hbm"), description="Directory shared with the model server (control block)."
    )
    node: str = Field(
        default_factory=socket.gethostname,
        description="Name of this node in Redis; in Kubernetes the pod uid.",
    )
    node_url: str = Field("", description="Where the router reaches the model server.")
    namespace: str = Field("default", description="Namespace of all keys in Redis.")
    redis_url: str = Field("", description="redis://, rediss:// or unix://. Empty: no digest.")
    redis_url_file: Path | None = Field(
        None, description="File with that URL instead; it may come and change at any time."
    )
    kube_token_dir: Path | None = Field(
        None,
        description="Directory of token, ca.crt and namespace: follow this pod's HBMPartition; PUT "
        "is refused while set.",
    )
    pod_name: str = Field("", description="Name of this pod, which is that of its HBMPartition.")
    pod_uid: str = Field("", description="Uid of this pod; a partition of another one is ignored.")
    policies_dir: Path = Field(
        Path("/etc/hbm/policies"), description="Where learned policies are mounted."
    )
    policy_file: Path | None = Field(
        None, description="JSON partition that somebody else writes; PUT is refused while set."
    )
    residual_file: Path | None = Field(
        None, description="ONNX file of a learned residual; it may come and change at any time."
    )
    residual_sha256: str = Field(
        "", pattern=r"^([0-9a-fA-F]{64})?$", description="Its hash, checked before use."
    )
    decision_log: Path | None = Field(
        None, description="File that takes every decision, for `hbm replay-decisions`."
    )
    decision_log_bytes: int = Field(
        64 << 20,
        ge=1 << 16,
        le=1 << 40,
        description="Its largest size; the one before it is kept beside it.",
    )
    host: str = Field("127.0.0.1", description="Address of /healthz, /readyz and /metrics.")
    port: int = Field(9400, ge=0, le=65535, description="Their port; 0: any free one.")
    ready_file: Path | None = Field(None, description="Written once the sidecar serves.")
    heartbeat_ms: float = Field(
        250.0, ge=20.0, le=60_000.0, description="Time between two heartbeats to Redis."
    )
    ttl_heartbeats: int = Field(
        4, ge=3, le=5, description="Heartbeats after which the node's keys expire."
    )
    digest_every: int = Field(
        8, ge=1, le=1000, description="An unchanged digest is sent again every so many heartbeats."
    )
    snapshot_refresh_s: float = Field(
        10.0,
        ge=0.0,
        le=3600.0,
        description="Time between residency snapshots asked for to refresh EMB coverage. 0: never.",
    )
    twin_budget: float = Field(
        0.2, gt=0.0, le=1.0, description="Share of a core the twin may use, at most."
    )

    @field_validator("run_dir")
    @classmethod
    def _socket_fits(cls, value: Path) -> Path:
        path = value.absolute() / ADMIN_SOCKET
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
            raise ValueError(
                f"{path} is {len(os.fsencode(path))} bytes long, a unix socket may have "
                f"{_MAX_SOCKET_PATH}; use a shorter directory"
            )
        return value.absolute()

    @field_validator("node", "namespace")
    @classmethod
    def _name(cls, value: str) -> str:
        return check_name(value)

    @field_validator("policy_file")
    @classmethod
    def _policy_file_is_a_file(cls, value: Path | None) -> Path | None:
        # One that is not there yet may come later.
        if value is not None and value.exists() and not value.is_file():
            raise ValueError(f"{value} is not a file; name the JSON file of a partition")
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: str) -> str:
        if value and urlsplit(value).scheme not in _REDIS_SCHEMES:
            raise ValueError(
                f"{value.split('@')[-1][:60]!r} is no Redis URL; use redis://HOST:PORT/DB, "
                "rediss:// or unix:///PATH"
            )
        try:
            _ = urlsplit(value).port
        except ValueError as error:
            raise ValueError(f"{value.split('@')[-1][:60]!r} is no Redis URL ({error})") from error
        return value

    @field_validator("node_url")
    @classmethod
    def _http(cls, value: str) -> str:
        if value and (
            urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).netloc
        ):
            raise ValueError(f"{value[:60]!r} is no address of a server; use http://HOST:PORT")
        return value

    @model_validator(mode="after")
    def _a_digest_needs_an_address(self) -> SidecarConfig:
        if self.redis_url and not self.node_url:
            raise ValueError("redis_url is set, so node_url is needed: the router must reach it")
        if self.redis_url and self.redis_url_file is not None:
            raise ValueError("redis_url and redis_url_file are both set; leave one out")
        return self

    @model_validator(mode="after")
    def _one_owner(self) -> SidecarConfig:
        if self.kube_token_dir is None:
            return self
        if self.policy_file is not None:
            raise ValueError("kube_token_dir and policy_file are both set; leave one out")
        if not self.pod_name or not self.pod_uid:
            raise ValueError("kube_token_dir is set, so pod_name and pod_uid are needed")
        return self

    @model_validator(mode="after")
    def _a_residual_has_a_hash(self) -> SidecarConfig:
        if (self.residual_file is None) != (not self.residual_sha256):
            raise ValueError(
                "residual_file and residual_sha256 belong together; give both or neither"
            )
        if self.residual_file is not None and self.kube_token_dir is not None:
            raise ValueError(
                "residual_file and kube_token_dir are both set; the partition names the artefact"
            )
        return self

    @property
    def admin_socket(self) -> Path:
        """Unix socket of /v1."""
        return self.run_dir / ADMIN_SOCKET

    @property
    def address(self) -> str:
        """`node_url`, or where it is left out (routers of a cluster go by the name) our host."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.node_url or f"http://{host}"

    def partition(self) -> Partition:
        """The wish it starts with."""
        return Partition(**{name: getattr(self, name) for name in Partition.model_fields})

    def policy(self) -> PolicyConfig:
        """The parameters of the decision."""
        parts: dict[str, type[BaseModel]] = {
            "anchor": AnchorConfig,
            "shield": ShieldConfig,
            "gate": GateConfig,
            "adapter": AdapterConfig,
            "residual": ResidualConfig,
        }
        return PolicyConfig.model_validate(
            {
                part: {name: getattr(self, name) for name in model.model_fields}
                for part, model in parts.items()
            }
        )

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """`inherited` with every setting in it, so that a child reads the same configuration."""
        environment = dict(inherited)
        for name in type(self).model_fields:
            value = getattr(self, name)
            key = f"{ENV_PREFIX}{name.upper()}"
            if value is None:
                environment.pop(key, None)
            else:
                environment[key] = str(value)
        return environment
