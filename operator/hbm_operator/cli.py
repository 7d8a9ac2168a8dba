"""`hbm operator`: the processes of the operator. What is heavy is imported by the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hbm_operator.controller.settings import ControllerSettings
from hbm_operator.flags import command
from hbm_operator.webhook.settings import WebhookSettings

app = typer.Typer(
    name="operator",
    help="The Kubernetes operator: controller, webhook, and its custom resources.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _group() -> None:
    """Keeps `hbm operator` a group however many commands it has."""


def _webhook(settings: WebhookSettings) -> None:
    import asyncio

    from hbm_operator.logs import configure_logs
    from hbm_operator.webhook.server import check, serve

    check(settings)
    configure_logs(settings.log_level)
    asyncio.run(serve(settings))


def _controller(settings: ControllerSettings) -> None:
    import asyncio

    import prometheus_client
    from hbm_kube.errors import KubeConfigError

    from hbm_operator.controller.process import ResourcesMissing, check, control
    from hbm_operator.controller.watching import WatchEnded
    from hbm_operator.logs import adopt_library_logs, configure_logs

    check(settings)
    configure_logs(settings.log_level)
    adopt_library_logs()
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    try:
        asyncio.run(control(settings))
    except KubeConfigError as error:
        raise ValueError(str(error)) from error
    except (ResourcesMissing, WatchEnded) as error:
        typer.echo(f"hbm operator controller: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error


@app.command("crds", help="Prints the custom resource definitions as YAML.")
def _crds(
    out: Annotated[
        Path | None, typer.Option(help="Write them into this directory, a file each.")
    ] = None,
) -> None:
    from hbm_operator.models import crd

    if out is None:
        typer.echo("---\n".join(crd.to_yaml(one) for one in crd.definitions().values()), nl=False)
        return
    try:
        written = crd.write(out)
    except OSError as error:
        typer.echo(f"hbm operator crds: --out {out} cannot be written ({error.strerror})", err=True)
        raise typer.Exit(2) from error
    for path in written:
        typer.echo(str(path))


command(
    app,
    "controller",
    ControllerSettings,
    _controller,
    "Keeps one HBMPartition per injected pod in line with the policies.",
)
command(
    app,
    "webhook",
    WebhookSettings,
    _webhook,
    "Puts the sidecar into pods as they are created.",
)
