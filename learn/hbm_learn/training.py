"""A whole training run in a folder: all seeds, resumable, and the checkpoint selected.

FOLDER/run.json          arguments, source revision
FOLDER/episodes/         simulated once, shared by all seeds
FOLDER/seed-K/           checkpoint-NNN.pt of every chunk, curve.jsonl (validation), tensorboard/
FOLDER/result.json       the selected checkpoint and its comparison on held-out episodes
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hbm_learn.checkpoint import Checkpoint
from hbm_learn.config import TrainConfig
from hbm_learn.episode import Library
from hbm_learn.network import Network
from hbm_learn.validation import Comparison, Interval, Validation


class TrainingError(ValueError):
    """A run that cannot begin or go on; the text says what to do."""


class Progress(Protocol):
    """Is told how far a run is."""

    def episodes(self, done: int, total: int) -> None:
        """Episodes simulated."""

    def steps(self, seed: int, done: int) -> None:
        """Training steps of one seed."""

    def validated(self, seed: int, done: int) -> None:
        """Validation episodes of one seed's newest checkpoint."""


class Quiet:
    """Nobody wants to know."""

    def episodes(self, done: int, total: int) -> None:
        """Not said."""

    def steps(self, seed: int, done: int) -> None:
        """Not said."""

    def validated(self, seed: int, done: int) -> None:
        """Not said."""


class Point(NamedTuple):
    """One checkpoint on the validation episodes."""

    chunk: int
    stage: str
    steps: int
    worth: Interval
    service: Interval
    p99: Interval
    late: Interval
    moved: Interval
    seconds: float
    """Of training since the checkpoint before."""


class Result(NamedTuple):
    """What a run came to."""

    seed: int
    checkpoint: Path
    curves: dict[int, list[Point]]
    held_out: Comparison


def train(
    config: TrainConfig, folder: Path, *, jobs: int = 1, progress: Progress | None = None
) -> Result:
    """Trains what is missing in the folder, selects and judges. Raises TrainingError."""
    told = progress or Quiet()
    begin(config, folder)
    library = Library(config.domain, folder / "episodes")
    wanted = config.training_seeds + config.validation_seeds + config.held_out_seeds
    missing = library.missing(wanted)
    for done, seed in enumerate(missing):
        told.episodes(done, len(missing))
        library.episode(seed)
    told.episodes(len(missing), len(missing))
    if jobs == 1 or len(config.seeds) == 1:
        validation = validation_of(config, library)
        for seed in config.seeds:
            train_seed(config, folder, seed, library, validation, told)
    else:
        _train_apart(config, folder, jobs, told)
    return select(config, folder, library, told)


def begin(config: TrainConfig, folder: Path) -> None:
    """Makes the folder, or finds the same run in it. Raises TrainingError."""
    described = folder / "run.json"
    arguments = json.loads(config.model_dump_json())
    if described.is_file():
        known = read_run(folder)["arguments"]
        differing = sorted(k for k in arguments if arguments[k] != known.get(k))
        if differing:
            raise TrainingError(
                f"{folder} holds a run with other arguments ({', '.join(differing)}); name another "
                "folder, or repeat the command that began it"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = described.with_suffix(".partial")
        text = {"arguments": arguments, "commit": source_revision()}
        partial.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
        partial.replace(described)
    except OSError as error:
        raise TrainingError(f"{folder} cannot be written ({error.strerror})") from error


def read_run(folder: Path) -> dict[str, Any]:
    """`run.json`. Raises TrainingError."""
    try:
        found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder} holds no training run; make one: hbm train") from error
    return found


def source_revision() -> str:
    """The commit of the source, with `+` when files differ from it; else the package's version."""
    where = Path(__file__).parent
    command = ["git", "-C", str(where)]
    try:
        head = subprocess.run(
            [*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        paths = [".", "../../sim/hbm_sim", "../../policy/hbm_policy"]
        changed = subprocess.run([*command, "diff", "--quiet", "HEAD", "--", *paths], check=False)
        return head.stdout.strip() + ("+" if changed.returncode else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    try:
        return f"hbm-partition {version('hbm-partition')}"
    except PackageNotFoundError:
        return "unknown"


def validation_of(config: TrainConfig, library: Library) -> Validation:
    """By which checkpoints are selected."""
    return Validation(library, config.validation_seeds, config.reward, config.period_ticks)


def checkpoint_path(folder: Path, seed: int, chunk: int) -> Path:
    """Of a seed, after so many chunks."""
    return folder / f"seed-{seed}" / f"checkpoint-{chunk:03d}.pt"


def train_seed(
    config: TrainConfig,
    folder: Path,
    seed: int,
    library: Library,
    validation: Validation,
    progress: Progress,
) -> None:
    """All chunks of one seed that are not there yet."""
    from hbm_learn.ppo import train_chunk

    own = folder / f"seed-{seed}"
    own.mkdir(exist_ok=True)
    for chunk in config.chunks():
        path = checkpoint_path(folder, seed, chunk.number + 1)
        began = time.monotonic()
        if not path.is_file():
            before = None
            if chunk.number:
                before = Checkpoint.load(checkpoint_path(folder, seed, chunk.number))
            after = train_chunk(
                config, library, seed, chunk, before, own, lambda done: progress.steps(seed, done)
            )
            after.save(path)
        seconds = time.monotonic() - began
        progress.steps(seed, chunk.first_step + chunk.steps)
        known = {point.chunk for point in read_curve(folder, seed)}
        if config.validated(chunk) and chunk.number + 1 not in known:
            checkpoint = Checkpoint.load(path)
            found = validation.compare(
                Network.of(checkpoint), lambda done: progress.validated(seed, done)
            )
            _add_point(
                folder, seed, chunk.number + 1, chunk.stage, checkpoint.steps, found, seconds
            )


def _add_point(
    folder: Path,
    seed: int,
    chunk: int,
    stage: str,
    steps: int,
    found: Comparison,
    seconds: float,
) -> None:
    point = Point(
        chunk, stage, steps, found.worth, found.service, found.p99, found.late, found.moved, seconds
    )
    path = folder / f"seed-{seed}" / "curve.jsonl"
    lines = [json.dumps(each._asdict()) for each in (*read_curve(folder, seed), point)]
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)


def read_curve(folder: Path, seed: int) -> list[Point]:
    """Validation of a seed so far, by chunk."""
    path = folder / f"seed-{seed}" / "curve.jsonl"
    points: dict[int, Point] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        held = json.loads(line)
        for name in ("worth", "service", "p99", "late", "moved"):
            held[name] = Interval(*held[name])
        points[held["chunk"]] = Point(**held)
    return [points[chunk] for chunk in sorted(points)]


def select(
    config: TrainConfig, folder: Path, library: Library, progress: Progress | None = None
) -> Result:
    """The checkpoint of the highest worth on validation, judged on the held-out episodes."""
    curves = {seed: read_curve(folder, seed) for seed in config.seeds}
    candidates = [(p.worth.mean, -p.chunk, seed) for seed in curves for p in curves[seed]]
    if not candidates:
        raise TrainingError(f"{folder} has no validated checkpoint; repeat hbm train")
    _, chunk, seed = max(candidates)
    path = checkpoint_path(folder, seed, -chunk)
    network = Network.of(Checkpoint.load(path))
    held_out = Validation(library, config.held_out_seeds, config.reward, config.period_ticks)
    told = progress or Quiet()
    found = held_out.compare(network, lambda done: told.validated(seed, done))
    result = Result(seed, path, curves, found)
    described = {
        "seed": seed,
        "checkpoint": str(path.relative_to(folder)),
        "held_out": {
            "seeds": found.seeds,
            **{
                name: getattr(found, name)._asdict()
                for name in ("worth", "service", "p99", "late", "moved")
            },
            "without": [each._asdict() for each in found.without],
            "given": [each._asdict() for each in found.given],
        },
    }
    partial = folder / "result.partial"
    partial.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / "result.json")
    return result


class _Sent:
    """Progress of another process, as messages."""

    def __init__(self, messages: Any) -> None:
        self._messages = messages

    def episodes(self, done: int, total: int) -> None:
        """Episodes are simulated before the processes begin."""

    def steps(self, seed: int, done: int) -> None:
        self._messages.put(("steps", seed, done))

    def validated(self, seed: int, done: int) -> None:
        self._messages.put(("validated", seed, done))


def _train_apart(config: TrainConfig, folder: Path, jobs: int, progress: Progress) -> None:
    """Seeds in processes of their own."""
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        _told(manager.Queue(), progress) as messages,
        ProcessPoolExecutor(min(jobs, len(config.seeds)), mp_context=context) as pool,
    ):
        tasks = [pool.submit(_one_seed, config, folder, seed, messages) for seed in config.seeds]
        for task in as_completed(tasks):
            task.result()


@contextmanager
def _told(messages: Any, progress: Progress) -> Iterator[Any]:
    from threading import Thread

    def listen() -> None:
        for kind, seed, done in iter(messages.get, None):
            getattr(progress, kind)(seed, done)

    listener = Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield messages
    finally:
        messages.put(None)
        listener.join()


def _one_seed(config: TrainConfig, folder: Path, seed: int, messages: Any) -> None:
    library = Library(config.domain, folder / "episodes")
    train_seed(config, folder, seed, library, validation_of(config, library), _Sent(messages))
