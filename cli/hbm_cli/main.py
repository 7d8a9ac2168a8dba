"""`hbm`: finds sub-commands by entry point and imports only the one that is asked for."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points, version

import click
from typer.main import get_command

_GROUP = "hbm.commands"
_SHORT_HELP = {
    "bench": "Benchmarks: each number of the documentation, with its reference beside it.",
    "demo": "The whole system on this machine, under load, in a few minutes.",
    "explain": "Why the sidecar took its last decisions.",
    "plan": "What a pool of a given size holds, before anything starts.",
    "router": "Ingress router: sends each user to the pod that holds them.",
    "serve": "Reference model server over one pool for rows and KV pages.",
    "sidecar": "Decides α for the model server beside it.",
    "sweep": "Exhaustive static sweep: the best α of a workload, by simulation.",
}


class _Commands(click.Group):
    """A click group whose commands stay unimported until one is used."""

    def _registered(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=_GROUP)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._registered())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        point = self._registered().get(cmd_name)
        if point is None:
            return None
        try:
            loaded = point.load()
        except ImportError as error:
            package = point.module.split(".")[0]
            raise click.ClickException(
                f"`hbm {cmd_name}` needs more than is installed ({error}). "
                f"Install the extra of {package}, for example: pip install 'hbm-partition[demo]'"
            ) from error
        command = get_command(loaded)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, _SHORT_HELP.get(name, "")) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.command(cls=_Commands, name="hbm", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("hbm-partition"), prog_name="hbm")
def main() -> None:
    """One GPU memory pool, two caches: embedding rows and per-user KV pages, split online."""


if __name__ == "__main__":
    sys.exit(main())
