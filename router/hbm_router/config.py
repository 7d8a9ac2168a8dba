"""Settings of the router: flags of `hbm router`, or environment variables with prefix HBM_."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from hbm_kube.config import TOKEN_DIR, KubeConfig
from hbm_kube.errors import KubeConfigError
from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from hbm_router.discovery import Backend, parse_backends

REDIS_SCHEMES: Final = ("redis://", "rediss://", "unix://")


class Policy(StrEnum):
    """How a node is chosen; `choose` has the formula of each."""

    COST_MS = "cost_ms"
    WEIGHTED = "weighted"
    CHWBL = "chwbl"
    LEAST_LOAD = "least_load"
    P2C = "p2c"
    ROUND_ROBIN = "round_robin"


class RouterSettings(BaseSettings):
    """Everything the router can be told. Times in ms or s as the name ends."""

    model_config = SettingsConfigDict(
        env_prefix="HBM_", frozen=True, extra="forbid", allow_inf_nan=False
    )

    backends: str = Field("", description="Servers: NAME=http://HOST:PORT, separated by commas.")
    service: str = Field(
        "", description="Kubernetes Service whose ready endpoints are the servers, instead."
    )
    service_namespace: str = Field(
        "", description="Namespace of that Service; empty: that of the router's own pod."
    )
    service_port: str = Field(
        "8000", min_length=1, description="Name or number of the port on the pods."
    )
    kube_token_dir: Path = Field(
        TOKEN_DIR, description="Directory of token, ca.crt and namespace of the router's pod."
    )
    redis_url: str | None = Field(
        None, description="Where sidecars publish. Without it users are spread by hash."
    )
    redis_url_file: Path | None = Field(
        None, description="File with that URL instead; it may come and change at any time."
    )
    namespace: str = Field(
        "default", min_length=1, max_length=253, description="Key prefix in Redis: hbm:NAMESPACE:*."
    )
    host: str = Field("127.0.0.1", description="Address to listen on, data and admin port.")
    port: int = Field(8080, ge=0, le=65535, description="Data port; 0 picks a free one.")
    admin_port: int = Field(
        0, ge=0, le=65535, description="Port of probes, metrics and explanations; 0 picks one."
    )
    policy: Policy = Field(Policy.COST_MS, description="How a node is chosen.")
    ready_file: Path | None = Field(None, description="Written once requests are accepted.")
    log_level: str = Field("info", description="debug, info, warning or error.")
    seed: int | None = Field(None, description="Seed of the choices among near ties.")

    # Cost
    tie_ms: float = Field(1.0, ge=0, description="Costs this close to the best are near ties.")
    tie_ratio: float = Field(0.05, ge=0, le=1, description="So are costs within this share of it.")
    bound: float = Field(
        1.25, gt=1, le=10, description="Bounded hashing: largest load over the average."
    )
    shed_over_deadline: bool = Field(
        False, description="Answer 429 when every node would miss X-HBM-Deadline-Ms."
    )
    max_queue_ms: float = Field(
        0, ge=0, description="Answer 429 when every node would queue longer; 0 never."
    )
    weight_kv: float = Field(0.5, ge=0, description="Policy weighted: weight of resident KV.")
    weight_emb: float = Field(0.2, ge=0, description="Policy weighted: weight of resident rows.")
    weight_load: float = Field(0.3, ge=0, description="Policy weighted: weight of free capacity.")
    weighted_full_ms: float = Field(
        100, gt=0, description="Policy weighted: the queue at which a node counts as full."
    )
    weighted_spill_load: float = Field(
        0.85, gt=0, le=1, description="Policy weighted: above it the least loaded node is taken."
    )

    # What is believed, and for how long
    poll_ms: float = Field(200, ge=10, description="How often Redis is read.")
    redis_timeout_ms: float = Field(1000, ge=10, description="Limit of one exchange with Redis.")
    fresh_s: float = Field(2, gt=0, description="Up to this age a digest is fully believed.")
    half_life_s: float = Field(5, gt=0, description="Then belief halves each such time.")
    expire_s: float = Field(30, gt=0, description="Beyond this age it is not believed at all.")
    speculative_ttl_s: float = Field(
        3, ge=0, le=60, description="A user counts as resident this long after being routed."
    )
    memory_users: int = Field(
        100_000, ge=0, description="Users whose history length is remembered."
    )

    # Limits of one request and of all
    max_inflight: int = Field(4096, ge=1, description="Requests in flight; more get 503.")
    max_connections: int = Field(10_000, ge=1, description="Client connections; more get 503.")
    max_head_bytes: int = Field(
        32_768, ge=1024, le=1 << 20, description="Request line and headers; larger get 431."
    )
    max_headers: int = Field(200, ge=8, description="Header fields of a request; more get 431.")
    max_body_bytes: int = Field(
        256 << 20, ge=0, description="Request bodies; larger get 413. 0 is no limit."
    )
    replay_bytes: int = Field(
        256 << 10, ge=0, description="Request bytes kept for a second try; longer ones get none."
    )

    # Time
    connect_timeout_s: float = Field(1, gt=0, description="Connecting to a backend.")
    response_timeout_s: float = Field(
        30, gt=0, description="Silence of a backend: until it answers, or amid an answer (504)."
    )
    head_timeout_s: float = Field(10, gt=0, description="A client sends its headers (408).")
    body_timeout_s: float = Field(10, gt=0, description="Silence of a client amid a body (408).")
    request_timeout_s: float = Field(300, gt=0, description="A client sends a whole request (408).")
    keep_alive_s: float = Field(75, gt=0, description="Idle client connections are kept this long.")
    upstream_idle_s: float = Field(
        4, gt=0, description="Idle backend connections; keep below the backend's own keep-alive."
    )
    write_stall_s: float = Field(60, gt=0, description="A client that reads nothing is dropped.")
    drain_settle_s: float = Field(
        2, ge=0, description="After SIGTERM: not ready, but still accepting, this long."
    )
    drain_timeout_s: float = Field(
        30, ge=0, description="Then requests in flight may finish, at most this long."
    )

    # Health and retries
    retry_ratio: float = Field(0.1, ge=0, le=1, description="Second tries per request, at most.")
    pure_paths: str = Field(
        "/v1/rank,/v2/",
        description="Paths whose POST changes nothing, so that it may be sent a second time.",
    )
    probe_path: str = Field("/v2/health/ready", description="Asked by active health checks.")
    probe_interval_s: float = Field(1, ge=0, description="Between health checks; 0 is none.")
    probe_timeout_s: float = Field(1, gt=0, description="A health check fails after this time.")
    probe_failures: int = Field(3, ge=1, description="Failed checks in a row that take a node out.")
    probe_successes: int = Field(2, ge=1, description="Good checks in a row that take it back.")
    outlier_failures: int = Field(
        5, ge=1, description="Failed requests in a row that eject a node for a while."
    )
    ejection_s: float = Field(5, gt=0, description="First ejection; doubles with each further one.")
    max_ejection_s: float = Field(60, gt=0, description="Longest ejection.")
    panic_ratio: float = Field(
        0.5, ge=0, le=1, description="With fewer healthy nodes than this, health is ignored."
    )

    @field_validator("redis_url")
    @classmethod
    def _redis_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(REDIS_SCHEMES):
            raise ValueError(f"{value!r} is not a Redis address; write redis://HOST:PORT/DB")
        if value is not None:
            try:
                _ = urlsplit(value).port
            except ValueError as error:
                raise ValueError(f"{value!r} is not a Redis address ({error})") from error
        return value

    @field_validator("ready_file")
    @classmethod
    def _ready_file(cls, value: Path | None) -> Path | None:
        if value is not None and value.is_dir():
            raise ValueError(f"{str(value)!r} is a directory; name a file in it")
        if value is not None and not value.parent.is_dir():
            raise ValueError(f"{str(value.parent)!r} is not a directory; make it first")
        return value

    @field_validator("backends")
    @classmethod
    def _backends(cls, value: str) -> str:
        if value:
            parse_backends(value)
        return value

    @field_validator("log_level")
    @classmethod
    def _log_level(cls, value: str) -> str:
        if value.lower() not in ("debug", "info", "warning", "error"):
            raise ValueError(f"{value!r} is not one of debug, info, warning, error")
        return value.lower()

    @field_validator("probe_path")
    @classmethod
    def _probe_path(cls, value: str) -> str:
        if not value.startswith("/") or any(char <= " " for char in value):
            raise ValueError(f"{value!r} must be a path that starts with '/' and has no blank")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RouterSettings:
        if self.expire_s <= self.fresh_s:
            raise ValueError(
                f"expire_s is {self.expire_s} and fresh_s is {self.fresh_s}; "
                "expire_s must be the larger one"
            )
        if self.redis_url is not None and self.redis_url_file is not None:
            raise ValueError("redis_url and redis_url_file are both set; leave one out")
        if self.service and self.backends:
            raise ValueError("backends and service are both set; leave one out")
        if self.service:
            self.kube_config()
        if self.max_ejection_s < self.ejection_s:
            raise ValueError(
                f"max_ejection_s is {self.max_ejection_s} and ejection_s is {self.ejection_s}; "
                "max_ejection_s must not be the smaller one"
            )
        return self

    def kube_config(self) -> KubeConfig:
        """The API server that knows the Service. Raises `ValueError` outside of a cluster."""
        try:
            return KubeConfig.in_cluster(self.kube_token_dir)
        except KubeConfigError as error:
            raise ValueError(
                f"service {self.service!r} needs a cluster: {error}; outside of one write "
                "--backends NAME=http://HOST:PORT,…"
            ) from error

    def parsed_backends(self) -> tuple[Backend, ...]:
        """The backends as a list."""
        return parse_backends(self.backends)

    def pure_path_prefixes(self) -> tuple[bytes, ...]:
        """`pure_paths` as the data path compares them."""
        return tuple(part.strip().encode() for part in self.pure_paths.split(",") if part.strip())
