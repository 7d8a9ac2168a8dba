"""Configuration of `hbm operator webhook`: flags, and HBM_OPERATOR_… by the same names."""

from __future__ import annotations

from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from hbm_operator import names
from hbm_operator.injector import InjectionSettings
from hbm_operator.injector.settings import GPU_RESOURCES
from hbm_operator.quantity import parse_quantity


class NativeSidecars(StrEnum):
    """Whether the sidecar is an init container that is always restarted."""

    AUTO = "auto"
    TRUE = "true"
    FALSE = "false"


class LogLevel(StrEnum):
    """What is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class WebhookSettings(BaseSettings):
    """All settings of `hbm operator webhook`."""

    model_config = SettingsConfigDict(env_prefix="HBM_OPERATOR_", extra="ignore", frozen=True)

    namespace: str = Field("hbm-system", description="Namespace that the operator runs in.")
    webhook_service: str = Field(
        "hbm-webhook", description="Service in front of the webhook; its certificate has that name."
    )
    host: str = Field("", description="Address to listen on. Empty: all.")
    port: int = Field(9443, ge=0, le=65535, description="Port of POST /mutate; 0: any free one.")
    admin_port: int = Field(
        8080, ge=0, le=65535, description="Port of /healthz, /readyz and /metrics; 0: any free one."
    )
    tls_dir: Path = Field(
        Path("/etc/hbm/tls"),
        description="Directory of tls.crt, tls.key and, if there is one, ca.crt. Waited for.",
    )
    tls_reload_s: float = Field(
        5.0, ge=0.05, le=300.0, description="How often the certificate files are looked at, s."
    )
    drain_s: float = Field(
        5.0,
        ge=0.0,
        le=300.0,
        description="How long it goes on serving after SIGTERM, until nobody sends any more, s.",
    )
    ready_file: Path | None = Field(
        None, description="JSON with both ports, written once the webhook serves."
    )
    sidecar_image: str = Field(min_length=1, description="Image of the injected sidecar.")
    sidecar_image_pull_policy: str = Field(
        "", pattern=r"^(Always|IfNotPresent|Never)?$", description="Its pull policy."
    )
    sidecar_cpu: str = Field("100m", description="CPU request of the sidecar.")
    sidecar_cpu_limit: str = Field("", description="CPU limit of the sidecar. Empty: none.")
    sidecar_memory: str = Field("400Mi", description="Memory request and limit of the sidecar.")
    sidecar_port: int = Field(
        names.SIDECAR_PORT, ge=1024, le=65535, description="Port of its health and metrics."
    )
    run_dir_size: str = Field(
        "64Mi", description="Size limit of the memory volume that sidecar and server share."
    )
    native_sidecars: NativeSidecars = Field(
        NativeSidecars.AUTO,
        description="Inject an always restarted init container; auto: where Kubernetes has them.",
    )
    gpu_resources: Annotated[tuple[str, ...], NoDecode] = Field(
        GPU_RESOURCES,
        description="Extended resources that stand for a GPU; comma-separated, with * as wildcard.",
    )
    log_level: LogLevel = Field(LogLevel.INFO, description="What is logged.")

    @field_validator("gpu_resources", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("sidecar_cpu", "sidecar_cpu_limit", "sidecar_memory", "run_dir_size")
    @classmethod
    def _amount(cls, value: str) -> str:
        if value and parse_quantity(value) <= 0:
            raise ValueError(f"{value!r} is not more than 0; write for example 100m or 400Mi")
        return value

    @property
    def server_name(self) -> str:
        """Name by which the API server calls the webhook, and which its certificate must have."""
        return f"{self.webhook_service}.{self.namespace}.svc"

    def injection(self, *, native: bool) -> InjectionSettings:
        """What the injector is told. `native`: whether the cluster has native sidecars."""
        return InjectionSettings(
            image=self.sidecar_image,
            image_pull_policy=self.sidecar_image_pull_policy,
            version=version("hbm-partition"),
            cpu=self.sidecar_cpu,
            cpu_limit=self.sidecar_cpu_limit,
            memory=self.sidecar_memory,
            run_dir_size=self.run_dir_size,
            port=self.sidecar_port,
            native=native,
            gpu_resources=self.gpu_resources,
        )
