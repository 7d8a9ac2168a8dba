"""`hbm`: finds sub-commands by entry point and imports only the one that is asked for."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

_GROUP = "hbm.commands"
_SHORT_HELP = {
    "advise": "From your own log: the best α, and whether adapting it would pay.",
    "bench": "Benchmarks: each number of the documentation, with its reference beside it.",
    "demo": "The whole system on this machine, under load, in a few minutes.",
    "eval": "Every way of choosing α side by side, on simulated requests.",
    "explain": "Why the sidecar took its last decisions.",
    "export": "A trained residual as the ONNX file that sidecars load, with its card.",
    "operator": "The Kubernetes operator: controller, webhook, custom resources.",
    "plan": "What a pool of a given size holds, before anything starts.",
    "replay-decisions": "Decides a log of decisions again and says where it differs.",
    "router": "Ingress router: sends each user to the pod that holds them.",
    "serve": "Reference model server over one pool for rows and KV pages.",
    "sidecar": "Decides α for the model server beside it.",
    "sweep": "Exhaustive static sweep: the best α of a workload, by simulation.",
    "trace": "What a workload or an access log is like: α*, reuse, hot users, dispersion.",
    "train": "Train the learned residual on the simulator.",
}


class _Commands(TyperGroup):
    """A group whose commands stay unimported until one is used."""

    def _registered(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=_GROUP)}

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self._registered())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        point = self._registered().get(cmd_name)
        if point is None:
            return None
        try:
            command = typer.main.get_command(point.load())
        except ImportError as error:
            package = point.module.split(".")[0]
            typer.echo(
                f"hbm {cmd_name}: {package} cannot be loaded here ({error}). Install its extra, "
                "for example: pip install 'hbm-partition[demo]'",
                err=True,
            )
            raise typer.Exit(2) from error
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = [(name, _SHORT_HELP.get(name, "")) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


app = typer.Typer(
    cls=_Commands,
    name="hbm",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hbm {version('hbm-partition')}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    """One GPU memory pool, two caches: embedding rows and per-user KV pages, split online."""


_COMMAND_LINE_ERROR: Any = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)
"""Typer has no public name for what every wrong command line raises."""


def main() -> None:
    """Entry point of the `hbm` command.

    A wrong command line of any command is one line on stderr and exit 2, like every other wrong
    configuration; a group that is given no command prints its help.
    """
    try:
        status = app(standalone_mode=False)
    except _COMMAND_LINE_ERROR as error:
        status = error.exit_code
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            context = getattr(error, "ctx", None)
            command = context.command_path if context else " ".join(["hbm", *sys.argv[1:2]])
            text = " ".join(error.format_message().split()).rstrip(".")
            typer.echo(f"{command}: {text}. See {command} --help.", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
