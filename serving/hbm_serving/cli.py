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
        str | None,
        typer.Option(help="A YAML file, or a preset: demo, tiny. [HBM_CONFIG, default demo]"),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. [HBM_HOST, default 0.0.0.0]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="0: any free port. [HBM_PORT, default 8080]")
    ] = None,
    admin_host: Annotated[
        str | None,
        typer.Option(help="Address of the admin endpoints. [HBM_ADMIN_HOST, default 127.0.0.1]"),
    ] = None,
    admin_port: Annotated[
        int | None, typer.Option(help="0: any free port. [HBM_ADMIN_PORT, default 0]")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the control block, shared with the sidecar. [HBM_RUN_DIR]"),
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="Name of this node. [HBM_NODE, default: host name]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:N or auto. [HBM_DEVICE, default auto]")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Share of the pool for rows at start. [HBM_ALPHA]")
    ] = None,
    alpha_min: Annotated[
        float | None, typer.Option(help="Lowest α taken from a sidecar. [HBM_ALPHA_MIN]")
    ] = None,
    alpha_max: Annotated[
        float | None, typer.Option(help="Highest α taken from a sidecar. [HBM_ALPHA_MAX]")
    ] = None,
    pool_bytes: Annotated[
        int | None, typer.Option(help="Size of the pool. [HBM_POOL_BYTES]")
    ] = None,
    link_bytes_per_s: Annotated[
        float | None,
        typer.Option(
            help="On CPU: make host-to-device copies cost what they cost on this link; 0: off. "
            "[HBM_LINK_BYTES_PER_S]"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and tables. [HBM_SEED]")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A safetensors file instead of the seed. [HBM_WEIGHTS]")
    ] = None,
    slo_ms: Annotated[
        float | None, typer.Option(help="Latency that counts as met. [HBM_SLO_MS]")
    ] = None,
    pipeline: Annotated[
        bool | None,
        typer.Option(
            "--pipeline/--no-pipeline",
            help="Gather rows of the next batch while this one computes. [HBM_PIPELINE]",
        ),
    ] = None,
    cache: Annotated[
        bool | None,
        typer.Option(
            "--cache/--no-cache",
            help="Without: no pool, everything is fetched and computed anew, for comparison. "
            "[HBM_CACHE]",
        ),
    ] = None,
    ready_file: Annotated[
        Path | None,
        typer.Option(help="Written by rename once requests are welcome. [HBM_READY_FILE]"),
    ] = None,
    log_json: Annotated[
        bool | None,
        typer.Option("--log-json/--log-text", help="Default: by terminal. [HBM_LOG_JSON]"),
    ] = None,
) -> None:
    """Reference model server over one pool for rows and KV pages."""
    flags: dict[str, Any] = dict(locals())
    from hbm_serving.config import load_config
    from hbm_serving.errors import ConfigError
    from hbm_serving.log import configure_log
    from hbm_serving.settings import read_settings

    try:
        settings = read_settings(flags)
        configure_log(settings.log_json)
        loaded = load_config(settings.config, settings.overrides())
        # Torch is imported only once the file is known to be sound.
        from hbm_serving.engine import Engine
        from hbm_serving.memory import pool_config
        from hbm_serving.server import bind, claim_run_dir
        from hbm_serving.server import serve as serve_until_stopped

        if loaded.server.cache:
            pool_config(loaded)
        if settings.run_dir is not None:
            claim_run_dir(settings.run_dir)
        public = bind(settings.host, settings.port)
        admin = bind(settings.admin_host, settings.admin_port)
        engine = Engine(
            loaded, device=settings.device, run_dir=settings.run_dir, node=settings.node
        )
    except (ConfigError, MemoryError) as error:
        _refuse(str(error))
    serve_until_stopped(engine, public, admin, settings.ready_file)
