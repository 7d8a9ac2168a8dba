"""Configuration of `hbm operator controller`: flags, and HBM_OPERATOR_… by the same names."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from hbm_operator.injector.settings import GPU_RESOURCES
from hbm_operator.webhook.settings import LogLevel


class Certificates(StrEnum):
    """Who makes the webhook's certificate."""

    SELF_SIGNED = "self-signed"
    GIVEN = "given"


Names = Annotated[tuple[str, ...], NoDecode]


class ControllerSettings(BaseSettings):
    """All settings of `hbm operator controller`."""

    model_config = SettingsConfigDict(env_prefix="HBM_OPERATOR_", extra="ignore", frozen=True)

    namespace: str = Field("hbm-system", description="Namespace that the operator runs in.")
    watch_namespaces: Names = Field(
        (), description="Namespaces to look after, comma-separated. Empty: all."
    )
    route_namespaces: Names = Field(
        (), description="Namespaces with a router: they get a Redis user without injected pods too."
    )
    kubeconfig: Path | None = Field(
        None, description="Where the API server is. Left out: as a pod of the cluster finds it."
    )
    resync_s: float = Field(
        300.0, ge=1.0, le=86_400.0, description="Time between two looks at everything, s; ± 10 %."
    )
    sweep_s: float = Field(
        15.0, ge=0.1, le=3600.0, description="Time between two sweeps for silent sidecars, s."
    )
    stale_s: float = Field(
        90.0, ge=1.0, le=86_400.0, description="Silence after which a sidecar counts as silent, s."
    )
    stall_s: float = Field(
        180.0,
        ge=1.0,
        le=86_400.0,
        description="Silence of a watch, bookmarks included, after which probes fail, s.",
    )
    crd_wait_s: float = Field(
        120.0,
        ge=0.0,
        le=3600.0,
        description="How long to wait at the start for custom resources that are not there, s.",
    )
    request_timeout_s: float = Field(
        30.0, ge=0.1, le=300.0, description="Limit of one request to the API server, s."
    )
    concurrency: int = Field(32, ge=1, le=256, description="Objects that are looked at at once.")
    sidecar_cluster_role: str = Field(
        "hbm-sidecar", description="ClusterRole that each namespace's sidecars are bound to."
    )
    redis_secret: str = Field(
        "",
        description="Secret of the own namespace with password and users of the embedded Redis; "
        "made where it is missing. Empty: there is none.",
    )
    redis_address: str = Field("", description="HOST:PORT of the embedded Redis.")
    redis_external_secret: str = Field(
        "",
        description="Secret of the own namespace about another Redis: address, username, "
        "password and, for TLS, ca.crt.",
    )
    redis_shared_user: bool = Field(
        False, description="Hand the external Redis' user on as it is; make no users."
    )
    certs: Certificates = Field(
        Certificates.GIVEN,
        description="self-signed: keep the webhook's certificate. given: somebody else does.",
    )
    webhook_service: str = Field("hbm-webhook", description="Service in front of the webhook.")
    webhook_configuration: str = Field(
        "hbm-webhook", description="MutatingWebhookConfiguration that gets the CA."
    )
    tls_secret: str = Field(
        "hbm-webhook-tls", description="Secret of the webhook's certificate, in the own namespace."
    )
    certificate_lifetime_s: float = Field(
        7_776_000.0, ge=10.0, description="Lifetime of a self-signed certificate, s."
    )
    gpu_resources: Names = Field(
        GPU_RESOURCES,
        description="Extended resources that stand for a GPU; comma-separated, with * as wildcard.",
    )
    host: str = Field("", description="Address to listen on. Empty: all.")
    admin_port: int = Field(
        8080, ge=0, le=65535, description="Port of /healthz, /readyz and /metrics; 0: any free one."
    )
    ready_file: Path | None = Field(
        None, description="JSON with the admin port, written once the controller works."
    )
    log_level: LogLevel = Field(LogLevel.INFO, description="What is logged.")

    @field_validator("watch_namespaces", "route_namespaces", "gpu_resources", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("redis_address")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if value and not (host and port.isdecimal()):
            raise ValueError(f"{value!r} is no HOST:PORT")
        return value

    @field_validator("redis_external_secret")
    @classmethod
    def _one_redis(cls, value: str, info: object) -> str:
        earlier = getattr(info, "data", {})
        if value and earlier.get("redis_secret"):
            raise ValueError("give --redis-secret or --redis-external-secret, not both")
        return value
