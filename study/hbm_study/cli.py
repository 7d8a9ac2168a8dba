"""`hbm eval`: every way of choosing α side by side, resumable and within a budget of time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hbm_study.run import Plan
    from hbm_study.suite import Suite

app = typer.Typer(
    name="eval",
    help="Every way of choosing α side by side, on the same simulated requests.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
)
DEFAULT_OUT = Path("out/eval")


@app.callback()
def evaluate(
    context: typer.Context,
    suite: Annotated[
        str,
        typer.Option(
            help="smoke (minutes), core (an hour), paper (hours), full (a day) or a YAML file."
        ),
    ] = "smoke",
    budget: Annotated[
        float, typer.Option(min=0.0, help="Minutes; no cell is begun after them. 0: only report.")
    ] = 180.0,
    jobs: Annotated[int, typer.Option(min=0, help="Worker processes. 0: one per core.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder of finished cells; a second run goes on where one ended.")
    ] = DEFAULT_OUT,
    document: Annotated[
        Path | None, typer.Option(help="Markdown file to write (default: OUT/results-policy.md).")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of curves and statics (default: OUT/cache).")
    ] = None,
    backend: Annotated[str, typer.Option(help="joblib (this machine) or ray (a cluster).")] = (
        "joblib"
    ),
    development: Annotated[
        bool,
        typer.Option("--development", help="Run changed scenarios too, and say they are no test."),
    ] = False,
    note: Annotated[str, typer.Option(help="A sentence for the head of the document.")] = "",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 when a cell is missing or an arm left out.")
    ] = False,
) -> None:
    """Runs a suite; writes tables, figures, JSON and Parquet from all finished cells."""
    if context.invoked_subcommand is not None:
        return
    from hbm_sim.workload import WorkloadError

    from hbm_study.arms import ArmError
    from hbm_study.frozen import NotFrozen, check_frozen
    from hbm_study.run import Plan
    from hbm_study.suite import SuiteError, load_suite

    if backend not in ("joblib", "ray"):
        _refuse(f"--backend is {backend!r}; it must be joblib or ray")
    try:
        chosen = load_suite(suite)
        plan = Plan.of(chosen)
        test = True
        try:
            check_frozen(plan.workloads, plan.seeds)
        except NotFrozen:
            if not development:
                raise
            test = False
        complete = _run(
            chosen,
            suite,
            plan,
            budget,
            jobs or os.cpu_count() or 1,
            out,
            document,
            cache,
            backend,
            test,
            note,
        )
    except (SuiteError, ArmError, WorkloadError, NotFrozen, OSError, ImportError) as error:
        _refuse(str(error))
    if strict and not complete:
        raise typer.Exit(1)


def _run(
    suite: Suite,
    name: str,
    plan: Plan,
    budget: float,
    jobs: int,
    out: Path,
    document: Path | None,
    cache: Path | None,
    backend: str,
    test: bool,
    note: str,
) -> bool:
    """-> every cell of the suite is finished."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from hbm_study.backends import backend as make_backend
    from hbm_study.cells import Store
    from hbm_study.document import write_document
    from hbm_study.evaluate import Done
    from hbm_study.export import write_tables
    from hbm_study.results import Results
    from hbm_study.run import run_suite

    # A worker of a cluster has a working directory of its own.
    out = out.resolve()
    cache = (cache or out / "cache").resolve()
    store = Store(out)
    for arm, reason in plan.left_out.items():
        typer.echo(f"left out: {arm}: {reason}", err=True)
    missing = plan.missing(store)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(f"{name}", total=len(plan.cells))
        progress.advance(task, len(plan.cells) - len(missing))

        def advance(done: Done) -> None:
            progress.update(task, description=f"{name}: {done.scene.label}")
            progress.advance(task, len(done.finished))

        if missing and budget > 0.0:
            missing = run_suite(
                plan,
                store,
                cache,
                make_backend(backend, jobs),
                60.0 * budget,
                advance,
            )
    cells = list(store.results(plan.cells.values()))
    if not cells:
        _refuse(f"no cell of suite {name} is finished in {out}; give it time with --budget")
    write_tables(cells, out)
    path = document or out / "results-policy.md"
    write_document(
        Results(cells),
        path,
        path.parent / "images" / "policy",
        cache,
        suite=name,
        description=suite.description,
        seeds=plan.seeds,
        missing=len(missing),
        left_out=plan.left_out,
        test=test,
        note=note,
    )
    minutes = sum(cell["seconds"] for cell in cells) / 60.0
    typer.echo(
        f"{len(cells)} of {len(plan.cells)} cells finished ({minutes:.1f} minutes of processor "
        f"time); written: {path}"
    )
    if missing:
        scenes = list(dict.fromkeys(cell.scene.label for cell in missing))
        typer.echo(
            f"{len(missing)} cells are missing, of {len(scenes)} scenes, the first: {scenes[0]}. "
            "The same command goes on."
        )
    return not missing and not plan.left_out


@app.command()
def freeze(
    workloads: Annotated[list[str], typer.Argument(help="Names of the test scenarios.")],
) -> None:
    """Freezes test scenarios: writes their hashes. Done once, before anything is tuned."""
    import json
    from importlib.resources import files

    from hbm_sim.workload import WorkloadError

    from hbm_study.frozen import digest_of

    try:
        content: dict[str, Any] = {
            "seeds": list(range(1, 21)),
            "workloads": {name: digest_of(name) for name in sorted(workloads)},
        }
    except WorkloadError as error:
        _refuse(str(error))
    path = Path(str(files("hbm_study"))) / "frozen.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    typer.echo(f"{len(content['workloads'])} scenarios frozen in {path.name}")


@app.command()
def tune(
    arm: Annotated[str, typer.Argument(help="Arm whose parameters are searched.")],
    trials: Annotated[int, typer.Option(min=1, help="Settings tried, the present one first.")] = 40,
    episodes: Annotated[
        int, typer.Option(min=1, max=1000, help="Training episodes, seeds 1000 on.")
    ] = 10,
    held: Annotated[
        int, typer.Option(min=0, max=100, help="Validation episodes, seeds 2000 on.")
    ] = 10,
    library: Annotated[
        Path | None, typer.Option(help="Folder that keeps simulated episodes.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="No trial begins after this.")] = 30.0,
    write: Annotated[bool, typer.Option("--write", help="Change the arm's own file.")] = False,
) -> None:
    """Searches an arm's parameters on training seeds and says what they are worth on others."""
    from hbm_study.arms import ArmError
    from hbm_study.tuning import tune_arm

    try:
        for line in tune_arm(arm, trials, episodes, held, library, 60.0 * minutes, write):
            typer.echo(line)
    except ArmError as error:
        _refuse(str(error))


@app.command()
def train(
    out: Annotated[
        Path | None, typer.Option(help="Folder of models (default: that of the package).")
    ] = None,
    episodes: Annotated[
        int, typer.Option(min=2, max=1000, help="Training episodes, seeds 1000 on.")
    ] = 60,
    held: Annotated[
        int, typer.Option(min=1, max=100, help="Validation episodes, seeds 2000 on.")
    ] = 12,
    steps: Annotated[int, typer.Option(min=512, help="Steps of the paper's PPO.")] = 20_000,
    library: Annotated[
        Path | None, typer.Option(help="Folder that keeps simulated episodes.")
    ] = None,
    only: Annotated[str, typer.Option(help="Some of xgboost,lstm,ppo.")] = "xgboost,lstm,ppo",
) -> None:
    """Trains the learned baselines, on training seeds only, and writes models with their cards."""
    from importlib.resources import files

    from hbm_study.train_arms import train_arms

    wanted = set(only.split(","))
    if not wanted <= {"xgboost", "lstm", "ppo"}:
        _refuse(f"--only is {only!r}; it must be some of xgboost,lstm,ppo")
    folder = out or Path(str(files("hbm_study"))) / "arm_models"
    for line in train_arms(folder, library, episodes, held, steps, wanted):
        typer.echo(line)


def _refuse(message: str) -> Any:
    typer.echo(f"hbm eval: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)
