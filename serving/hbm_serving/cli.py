"""`hbm serve`: reads the configuration, refuses a wrong one with exit code 2, serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    name="serve",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _refuse(message: str) -> NoReturn:
    typer.echo(f"hbm serve: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)


@app.command("serve")
def serve(
    config: Annotated[
        str, typer.Option(envvar="HBM_CONFIG", help="A YAML file, or a preset: demo, tiny.")
    ] = "demo",
    host: Annotated[str, typer.Option(envvar="HBM_HOST", help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[
        int, typer.Option(envvar="HBM_PORT", min=0, max=65535, help="0: any free port.")
    ] = 8080,
    admin_host: Annotated[
        str, typer.Option(envvar="HBM_ADMIN_HOST", help="Address of the admin endpoints.")
    ] = "127.0.0.1",
    admin_port: Annotated[
        int, typer.Option(envvar="HBM_ADMIN_PORT", min=0, max=65535, help="0: any free port.")
    ] = 0,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="HBM_RUN_DIR", help="Folder of the control block, shared with the sidecar."
        ),
    ] = None,
    node: Annotated[
        str | None, typer.Option(envvar="HBM_NODE", help="Name of this node; default: host name.")
    ] = None,
    device: Annotated[
        str, typer.Option(envvar="HBM_DEVICE", help="cpu, cuda, cuda:N or auto.")
    ] = "auto",
    alpha: Annotated[
        float | None, typer.Option(envvar="HBM_ALPHA", help="Share of the pool for rows at start.")
    ] = None,
    alpha_min: Annotated[
        float | None, typer.Option(envvar="HBM_ALPHA_MIN", help="Lowest α taken from a sidecar.")
    ] = None,
    alpha_max: Annotated[
        float | None, typer.Option(envvar="HBM_ALPHA_MAX", help="Highest α taken from a sidecar.")
    ] = None,
    pool_bytes: Annotated[
        int | None, typer.Option(envvar="HBM_POOL_BYTES", help="Size of the pool.")
    ] = None,
    link_bytes_per_s: Annotated[
        float | None,
        typer.Option(
            envvar="HBM_LINK_BYTES_PER_S",
            help="On CPU: make host-to-device copies cost what they cost on this link; 0: off.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(envvar="HBM_SEED", help="Seed of weights and tables.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(envvar="HBM_WEIGHTS", help="A safetensors file instead of the seed."),
    ] = None,
    slo_ms: Annotated[
        float | None, typer.Option(envvar="HBM_SLO_MS", help="Latency that counts as met.")
    ] = None,
    pipeline: Annotated[
        bool | None,
        typer.Option(
            "--pipeline/--no-pipeline",
            envvar="HBM_PIPELINE",
            help="Gather rows of the next batch while this one computes.",
        ),
    ] = None,
    cache: Annotated[
        bool | None,
        typer.Option(
            "--cache/--no-cache",
            envvar="HBM_CACHE",
            help="Without: no pool, everything is fetched and computed anew (for comparison).",
        ),
    ] = None,
    ready_file: Annotated[
        Path | None,
        typer.Option(envvar="HBM_READY_FILE", help="Written by rename once requests are welcome."),
    ] = None,
    log_json: Annotated[
        bool | None,
        typer.Option("--log-json/--log-text", envvar="HBM_LOG_JSON", help="Default: by terminal."),
    ] = None,
) -> None:
    """Reference model server over one pool for rows and KV pages."""
    import socket

    from hbm_serving.config import load_config
    from hbm_serving.errors import ConfigError
    from hbm_serving.log import configure_log

    overrides: dict[str, Any] = {
        "pool.alpha": alpha,
        "pool.alpha_min": alpha_min,
        "pool.alpha_max": alpha_max,
        "pool.pool_bytes": pool_bytes,
        "server.seed": seed,
        "server.weights": weights,
        "server.slo_ms": slo_ms,
        "server.pipeline": pipeline,
        "server.cache": cache,
    }
    given = {name: value for name, value in overrides.items() if value is not None}
    if link_bytes_per_s is not None:
        given["pool.link_bytes_per_s"] = link_bytes_per_s or None
    configure_log(log_json)
    try:
        loaded = load_config(config, given)
        if ready_file is not None and not ready_file.parent.is_dir():
            raise ConfigError(f"--ready-file: {ready_file.parent} is not a directory")
        if ready_file is not None and ready_file.is_dir():
            raise ConfigError(f"--ready-file: {ready_file} is a directory; name a file in it")
        # Torch is imported only once the file is known to be sound.
        from hbm_serving.engine import Engine
        from hbm_serving.memory import pool_config
        from hbm_serving.server import bind, claim_run_dir
        from hbm_serving.server import serve as serve_until_stopped

        if loaded.server.cache:
            pool_config(loaded)
        if run_dir is not None:
            claim_run_dir(run_dir)
        public, admin = bind(host, port), bind(admin_host, admin_port)
        engine = Engine(loaded, device=device, run_dir=run_dir, node=node or socket.gethostname())
    except (ConfigError, MemoryError) as error:
        _refuse(str(error))
    serve_until_stopped(engine, public, admin, ready_file)
