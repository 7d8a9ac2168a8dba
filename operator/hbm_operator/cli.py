"""`hbm operator`: the processes of the operator. What is heavy is imported by the command."""

from __future__ import annotations

import typer

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


command(
    app,
    "webhook",
    WebhookSettings,
    _webhook,
    "Puts the sidecar into pods as they are created.",
)
