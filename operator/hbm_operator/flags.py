"""Command-line flags out of a settings class: one option per field, by the same name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from pydantic_settings import BaseSettings

S = TypeVar("S", bound=BaseSettings)


def command(
    app: typer.Typer, name: str, settings: type[S], run: Callable[[S], None], help_: str
) -> None:
    """Registers a command whose flags are the fields of `settings`; flags win over environment.

    Args:
        app: group of commands.
        name: of the command.
        settings: pydantic settings; a field's description is the flag's help.
        run: gets the settings; raises ValueError or OSError for what is wrong with them.
        help_: one line.
    """

    def parsed(**flags: Any) -> None:
        given = {flag: value for flag, value in flags.items() if value is not None}
        try:
            run(settings(**given))
        except ValidationError as error:
            _refuse(name, _complaint(error))
        except (ValueError, OSError) as error:
            _refuse(name, str(error))

    parsed.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [_parameter(field, info) for field, info in settings.model_fields.items()]
    )
    app.command(name, help=help_)(parsed)


def _parameter(name: str, field: Any) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    simple = field.annotation in (bool, int, float)
    default = "" if field.is_required() else field.get_default()
    if isinstance(default, tuple):
        default = ",".join(default)
    shown = "" if default is None or default == "" else f" [default: {default}]"
    option = typer.Option(
        f"{flag}/--no-{name.replace('_', '-')}" if field.annotation is bool else flag,
        help=f"{field.description}{shown}",
        show_default=False,
    )
    # What is neither a number nor a switch is text here; the settings say what it must be.
    annotation = field.annotation if simple else str
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[annotation | None, option],
    )


def _complaint(error: ValidationError) -> str:
    """The first problem as one line: flag, what is wrong, what was given."""
    problem = error.errors()[0]
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    flag = f"--{str(problem['loc'][0]).replace('_', '-')}"
    if problem["type"] == "missing":
        return f"{flag} is needed (or HBM_OPERATOR_{str(problem['loc'][0]).upper()})"
    given = repr(problem.get("input"))
    shown = "" if given in message else f" (got {re.sub(r'//[^@/]*@', '//…@', given)})"
    return f"{flag}: {message}{shown}"


def _refuse(name: str, message: str) -> None:
    typer.echo(f"hbm operator {name}: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)
