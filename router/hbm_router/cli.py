"""`hbm router`. Every setting is a flag and an environment variable HBM_…; flags win."""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any

import typer

from hbm_router.config import RouterSettings

app = typer.Typer(
    name="router",
    help="Ingress router: sends each user to the pod that holds them.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
SWITCH_INTERVAL_S = 0.0005
"""Reading Redis and answering scrapes happen in threads beside the data path: with Python's
default of 5 ms each of their busy stretches would hold up requests for that long."""


def _complaint(error: Any) -> str:
    """The first problem of a validation error as one line: flag, what is wrong."""
    problem = error.errors()[0]
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return str(message)
    name = str(problem["loc"][0])
    given = problem.get("input")
    shown = f" (got {given!r})" if not message.startswith(("backend", repr(given))) else ""
    line = f"--{name.replace('_', '-')}: {message}{shown}"
    return re.sub(r"//[^@/\s]*@", "//…@", line)  # a URL may carry a password


def _run(**flags: Any) -> None:
    """Ingress router: sends each user to the pod that holds them."""
    import pydantic

    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = RouterSettings(**given)
        if not settings.backends and not settings.service:
            raise ValueError(
                "--backends or --service: no backend is given; write --backends "
                "NAME=http://HOST:PORT,… or, in a cluster, --service NAME"
            )
    except pydantic.ValidationError as error:
        _refuse(_complaint(error))
    except ValueError as error:
        _refuse(str(error))

    import asyncio
    import sys

    import uvloop

    from hbm_router.logs import configure_logs
    from hbm_router.server import check_ports, serve

    try:
        check_ports(settings)
    except OSError as error:
        _refuse(str(error))
    configure_logs(settings.log_level)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings))


def _refuse(message: str) -> None:
    line = " ".join(message.split())
    typer.echo(f"hbm router: {line}", err=True)
    raise typer.Exit(2)


def _signature() -> inspect.Signature:
    """One option per setting: name, type and help come from `RouterSettings`."""
    parameters = []
    for name, field in RouterSettings.model_fields.items():
        default = field.get_default()
        shown = "" if default is None or default == "" else f" [default: {default}]"
        option = typer.Option(
            f"--{name.replace('_', '-')}"
            + (f"/--no-{name.replace('_', '-')}" if field.annotation is bool else ""),
            help=f"{field.description}{shown}",
            show_default=False,
        )
        annotation: Any = field.annotation
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[annotation | None, option],
            )
        )
    return inspect.Signature(parameters)


_run.__signature__ = _signature()  # type: ignore[attr-defined]
app.command("router")(_run)
