"""How far a training run is: bars on a terminal, a line per event where there is none."""

from __future__ import annotations

from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hbm_learn.config import TrainConfig


class Bars:
    """One bar for the episodes, one per seed; a context manager."""

    def __init__(self, config: TrainConfig, stream: IO[str]) -> None:
        console = Console(file=stream)
        self._total = sum(chunk.steps for chunk in config.chunks())
        self._validating = config.validation_episodes
        self._console = console
        self._live = console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._tasks = {
            seed: self._bars.add_task(f"seed {seed}", total=self._total, visible=False)
            for seed in config.seeds
        }
        self._episodes = self._bars.add_task("episodes", total=None, visible=False)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def episodes(self, done: int, total: int) -> None:
        """Episodes simulated."""
        if total:
            self._bars.update(self._episodes, completed=done, total=total, visible=True)
            if not self._live and done % 8 == 0:
                self._console.print(f"episodes: {done} of {total}")

    def steps(self, seed: int, done: int) -> None:
        """Training steps of one seed."""
        task = self._tasks[seed]
        self._bars.update(task, completed=done, visible=True, description=f"seed {seed}")
        if not self._live:
            self._console.print(f"seed {seed}: {done} of {self._total} steps")

    def validated(self, seed: int, done: int) -> None:
        """Validation episodes of one seed's newest checkpoint."""
        self._bars.update(
            self._tasks[seed], description=f"seed {seed}, validating {done}", visible=True
        )
