"""`hbm train` and `hbm export`. Light to import: what is heavy is imported by the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from hbm_learn.config import TrainConfig


def _app(name: str) -> typer.Typer:
    return typer.Typer(
        name=name,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


train = _app("train")
export = _app("export")


def _fail(command: str, text: str) -> NoReturn:
    """One line on stderr, exit 2."""
    typer.echo(f"{command}: {' '.join(text.split())}", err=True)
    raise typer.Exit(2)


@train.command("train")
def run_train(
    out: Annotated[
        Path, typer.Option(help="Folder of the run; named again, the run is taken up again.")
    ] = Path("out/train"),
    config: Annotated[
        Path | None, typer.Option(help="YAML file with arguments by their names (--arguments).")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="One argument; the value is YAML. Repeatable."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Seeds trained at once.")] = 1,
    arguments: Annotated[
        bool, typer.Option("--arguments", help="Lists all arguments with their meaning, and ends.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The result on stdout, everything else on stderr.")
    ] = False,
) -> None:
    """Train the learned residual on the simulator; the best seed on validation is kept."""
    from hbm_learn.checkpoint import CheckpointError

    if arguments:
        _list_arguments()
        return
    given = _arguments(config, set_ or [])
    from hbm_learn.training import TrainingError
    from hbm_learn.training import train as train_all

    try:
        with _progress(given) as progress:
            result = train_all(given, out, jobs=jobs, progress=progress)
    except (TrainingError, CheckpointError) as error:
        _fail("hbm train", str(error))
    except KeyboardInterrupt:
        typer.echo(
            "hbm train: interrupted; the same command goes on from the last checkpoint", err=True
        )
        raise typer.Exit(130) from None
    if as_json:
        typer.echo((out / "result.json").read_text(encoding="utf-8"), nl=False)
        return
    found = result.held_out
    typer.echo(f"selected: seed {result.seed}, {result.checkpoint}")
    for name, what in (("service", "service time"), ("p99", "pooled P99")):
        mean, low, high = getattr(found, name)
        typer.echo(
            f"held out, {len(found.seeds)} episodes: {what} {mean:+.2f} % ({low:+.2f} to "
            f"{high:+.2f}) against the stack without it"
        )
    typer.echo(f"next: hbm export {out} --out policies/residual.onnx")


@export.command("export")
def run_export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished training run.")],
    out: Annotated[
        Path, typer.Option(help="The ONNX file; its card (.md) is written beside it.")
    ] = Path("residual.onnx"),
    gain: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of its wish that `residual_gain` 1 takes."),
    ] = 1.0,
    note: Annotated[str, typer.Option(help="A sentence for the limits on the card.")] = "",
) -> None:
    """Write a trained residual as the ONNX file that sidecars load, and its card."""
    from hbm_learn.checkpoint import CheckpointError
    from hbm_learn.export import export as write
    from hbm_learn.training import TrainingError

    try:
        done = write(run, out, gain=gain, note=note)
    except (TrainingError, CheckpointError) as error:
        _fail("hbm export", str(error))
    typer.echo(f"{done.path}: {done.size_bytes} bytes, sha256 {done.sha256}")
    typer.echo(f"{done.card}: its card")


def _arguments(config: Path | None, settings: list[str]) -> TrainConfig:
    import yaml
    from pydantic import ValidationError

    from hbm_learn.config import TrainConfig

    given: dict[str, Any] = {}
    if config is not None:
        try:
            held = yaml.safe_load(config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            _fail("hbm train", f"{config} cannot be read as YAML ({error})")
        if not isinstance(held, dict):
            _fail("hbm train", f"{config} must be a mapping of arguments (hbm train --arguments)")
        given = held
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            _fail("hbm train", f"--set {setting} has no value; write NAME=VALUE")
        *sections, last = name.split(".")
        place = given
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                _fail("hbm train", f"--set {setting}: {section} has no arguments of its own")
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            _fail("hbm train", f"--set {setting}: the value is no YAML")
    try:
        return TrainConfig.model_validate(given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        said = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            said = "there is no such argument; hbm train --arguments lists them"
        _fail("hbm train", f"{where}: {said} (given: {str(problem['input'])[:60]})")


def _list_arguments() -> None:
    from pydantic import BaseModel

    from hbm_learn.config import TrainConfig

    def listed(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            if isinstance(field.default, BaseModel):
                listed(type(field.default), f"{prefix}{name}.")
                continue
            meaning = " ".join((field.description or "").split())
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            typer.echo(f"{prefix}{name}={default}\n    {meaning}")

    listed(TrainConfig, "")


def _progress(config: TrainConfig) -> Any:
    from hbm_learn.progress import Bars

    return Bars(config, sys.stderr)
