"""Settings of `hbm serve`: flags, or environment variables with prefix HBM_; flags win.

What is served stands in the YAML file (`config`); these say where this process runs, and change
single values of that file.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from hbm_pool.contracts.names import check_name
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from hbm_serving.errors import ConfigError


class ServeSettings(BaseSettings):
    """Everything that can be told on the command line. None: as the YAML file says."""

    model_config = SettingsConfigDict(
        env_prefix="HBM_",
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
    )

    config: str = "demo"
    host: str = "0.0.0.0"
    port: int = Field(8080, ge=0, le=65535)
    admin_host: str = "127.0.0.1"
    admin_port: int = Field(0, ge=0, le=65535)
    run_dir: Path | None = None
    node: str = Field(default_factory=socket.gethostname)
    device: str = "auto"
    alpha: float | None = None
    alpha_min: float | None = None
    alpha_max: float | None = None
    pool_bytes: int | None = None
    link_bytes_per_s: float | None = Field(None, ge=0.0)
    seed: int | None = None
    weights: Path | None = None
    slo_ms: float | None = None
    pipeline: bool | None = None
    cache: bool | None = None
    ready_file: Path | None = None
    log_json: bool | None = None

    @field_validator("node")
    @classmethod
    def _node(cls, value: str) -> str:
        return check_name(value)

    @field_validator("run_dir")
    @classmethod
    def _run_dir(cls, value: Path | None) -> Path | None:
        # A typo must not silently cost the sidecar.
        if value is not None and not value.is_dir():
            raise ValueError(f"{value} is not a directory; make it first")
        return value

    @field_validator("ready_file")
    @classmethod
    def _ready_file(cls, value: Path | None) -> Path | None:
        if value is not None and not value.parent.is_dir():
            raise ValueError(f"{value.parent} is not a directory; make it first")
        if value is not None and value.is_dir():
            raise ValueError(f"{value} is a directory; name a file in it")
        return value

    def overrides(self) -> dict[str, Any]:
        """What replaces values of the YAML file, by `section.key`."""
        told = {
            "pool.alpha": self.alpha,
            "pool.alpha_min": self.alpha_min,
            "pool.alpha_max": self.alpha_max,
            "pool.pool_bytes": self.pool_bytes,
            "server.seed": self.seed,
            "server.weights": self.weights,
            "server.slo_ms": self.slo_ms,
            "server.pipeline": self.pipeline,
            "server.cache": self.cache,
        }
        given: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
        if self.link_bytes_per_s is not None:
            given["pool.link_bytes_per_s"] = self.link_bytes_per_s or None
        return given


def read_settings(flags: dict[str, Any]) -> ServeSettings:
    """Settings out of flags (None: not given) and the environment.

    Raises `ConfigError` with one line that names the flag, what is wrong and the value.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return ServeSettings(**given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = str(problem["loc"][0]).replace("_", "-")
        message = problem["msg"].removeprefix("Value error, ")
        value = "" if problem["type"] == "value_error" else f" (got {problem['input']!r})"
        raise ConfigError(f"--{name}: {message}{value}") from error
