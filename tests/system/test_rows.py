"""Rows pushed into a whole server under load, α moved to and fro, the server killed in a batch.

Every answer is compared with a reference that has no cache and knows under which rows each token
was computed: new tokens and candidates under those in force when the request was served, reused
ones under those of the request that computed them.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from hbm_demo.processes import Processes
from hbm_pool.contracts import headers
from hbm_pool.contracts.control_block import ServerView, SidecarBlock
from hbm_pool.contracts.records import COMMAND
from hbm_serving.config import Config, load_config
from hbm_serving.reference import ReferenceScorer, max_error

from .conftest import wait_until

pytestmark = pytest.mark.timeout(420)
TOLERANCE = 1e-5
BUSY_S = 300.0
"""However busy the machine is."""
HEADER_ROUNDING_S = 0.0006
CLIENTS, USERS_PER_CLIENT = 6, 4
ANSWERS_PER_PUSH, ANSWERS_PER_MOVE = 8, 30
ROWS_PER_PUSH, HOT_ITEMS = 20, 300
"""So few that each push changes rows of most users."""
LONGEST = 60


class Push(NamedTuple):
    """Rows pushed into one table, and when."""

    table: str
    ids: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    begun_s: float
    ended_s: float = 0.0


class Answer(NamedTuple):
    """A request and what came back. Epochs count pushes."""

    user: str
    items: npt.NDArray[np.int64]
    timestamps: npt.NDArray[np.int64]
    candidates: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    reused: int
    lag_s: float
    sent_s: float
    came_s: float
    first_epoch: int  # pushes that had ended when it was sent
    last_epoch: int  # pushes that had begun when the answer came


class RowsReference(ReferenceScorer):
    """Takes the rows of each token from an epoch of its own."""

    def __init__(self, *weights: Any) -> None:
        super().__init__(*weights)
        self._epochs: list[Mapping[str, torch.Tensor]] = [self.tables]
        self._of_token: Sequence[int] = ()

    def push(self, push: Push) -> None:
        tables = dict(self._epochs[-1])
        tables[push.table] = tables[push.table].clone()
        tables[push.table][torch.from_numpy(push.ids)] = torch.from_numpy(push.values)
        self._epochs.append(tables)

    def score_at(self, answer: Answer, epochs: Sequence[int]) -> npt.NDArray[np.float32]:
        """Scores when token i of history and candidates was computed at `epochs[i]`."""
        self._of_token = epochs
        return self.score(answer.items, answer.timestamps, answer.candidates)

    def _embed(self, *batch: Any) -> torch.Tensor:
        embedded = {}
        for epoch in set(self._of_token):
            self.tables = dict(self._epochs[epoch])
            embedded[epoch] = super()._embed(*batch)
        return torch.stack([embedded[epoch][i] for i, epoch in enumerate(self._of_token)])


class Node:
    """One `hbm serve`, crowded, and everything that was done to it since it started."""

    def __init__(self, processes: Processes, directory: Path, max_kv_row_lag_s: float) -> None:
        self._processes = processes
        self._directory = directory
        self.config: Config = load_config("tiny", {"pool.max_kv_row_lag_s": max_kv_row_lag_s})
        text = yaml.safe_dump(self.config.model_dump(mode="json"))
        (directory / "serve.yaml").write_text(text)
        self.run_dir = directory / "run"
        self.run_dir.mkdir()
        self.start()

    def start(self) -> None:
        ready_file = self._directory / "ready.json"
        ready_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "hbm_cli.main", "serve", "--host", "127.0.0.1"]
        command += ["--config", str(self._directory / "serve.yaml"), "--port", "0"]
        command += ["--run-dir", str(self.run_dir), "--ready-file", str(ready_file)]
        self.process = self._processes.start(
            "server", command, ready_file=ready_file, environment={"OMP_NUM_THREADS": "1"}
        )
        ready = self.process.wait_ready(120.0)
        self.url = f"http://127.0.0.1:{ready['port']}"
        self.admin_url = f"http://127.0.0.1:{ready['admin_port']}"
        self.pushes: list[Push] = []
        self.ended = 0  # of the pushes
        self.answers: list[Answer] = []  # of one user in their order
        self.lost = 0
        self._lock = threading.Lock()

    def kill(self) -> None:
        self.process.popen.kill()
        self.process.popen.wait()
        self._processes.forget(self.process)

    def violations(self) -> list[str]:
        answer = httpx.get(f"{self.admin_url}/v1/admin/integrity", timeout=60.0)
        found: list[str] = answer.json()["violations"]
        return found

    @contextmanager
    def load(self, seed: int) -> Iterator[None]:
        """Clients, a pusher and a mover, until the block is left; all of them must end well."""
        stop = threading.Event()
        faults: list[BaseException] = []
        parts: list[Callable[[threading.Event], None]] = [
            lambda stop: self._push(stop, np.random.default_rng((seed, 100))),
            self._move,
            *(
                lambda stop, client=client: self._ask(stop, client, (seed, client))
                for client in range(CLIENTS)
            ),
        ]

        def run(part: Callable[[threading.Event], None]) -> None:
            try:
                part(stop)
            except BaseException as fault:
                faults.append(fault)

        threads = [threading.Thread(target=run, args=(part,), daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join(60.0)
        assert faults == []
        assert not any(thread.is_alive() for thread in threads)

    def _ask(self, stop: threading.Event, client: int, seed: tuple[int, int]) -> None:
        """Users of one client come again and again with longer histories, one at a time."""
        random = np.random.default_rng(seed)
        histories = {f"{client}-{n}": np.empty((0, 2), np.int64) for n in range(USERS_PER_CLIENT)}
        user = ""
        with httpx.Client(base_url=self.url, timeout=60.0) as http:
            while not stop.is_set():
                if not user or random.random() < 0.4:  # else the same again: its KV is fresh
                    user = str(random.choice(list(histories)))
                history = histories[user]
                if len(history) > LONGEST - 6:
                    history = history[: int(random.integers(0, LONGEST))]
                count = int(random.integers(1, 7))
                since = int(history[-1, 1]) if len(history) else 0
                new = np.stack(
                    [
                        random.integers(0, HOT_ITEMS, count),
                        since + np.cumsum(random.integers(1, 5000, count)),
                    ],
                    axis=1,
                )
                histories[user] = history = np.concatenate([history, new])
                candidates = random.integers(0, HOT_ITEMS, 6)
                body = {
                    "history": {
                        "items": history[:, 0].tolist(),
                        "timestamps": history[:, 1].tolist(),
                    },
                    "candidates": candidates.tolist(),
                }
                with self._lock:
                    first_epoch = self.ended
                sent_s = time.monotonic()
                try:
                    answer = http.post("/v1/rank", json=body, headers={"X-User-ID": user})
                except httpx.TransportError:
                    with self._lock:
                        self.lost += 1  # the server was killed under it
                    return
                came_s = time.monotonic()
                assert answer.status_code == 200, answer.text
                with self._lock:
                    self.answers.append(
                        Answer(
                            user,
                            history[:, 0],
                            history[:, 1],
                            candidates,
                            np.array(answer.json()["scores"], np.float32),
                            int(answer.headers[headers.KV_REUSED_TOKENS]),
                            float(answer.headers[headers.KV_ROW_LAG_S]),
                            sent_s,
                            came_s,
                            first_epoch,
                            len(self.pushes),
                        )
                    )

    def _push(self, stop: threading.Event, random: np.random.Generator) -> None:
        with httpx.Client(base_url=self.admin_url, timeout=60.0) as http:
            for epoch in itertools.count(1):
                if not self._goes_on(stop, epoch * ANSWERS_PER_PUSH):
                    return
                table = self.config.model.tables[int(random.random() < 0.2)]
                # Hot items have the first rows of the first table; of the other one, any.
                rows = HOT_ITEMS if table is self.config.model.tables[0] else table.rows
                ids = random.choice(rows, ROWS_PER_PUSH, replace=False).astype(np.int64)
                values = random.standard_normal((ROWS_PER_PUSH, table.width), dtype=np.float32)
                push = Push(table.name, ids, values, time.monotonic())
                with self._lock:
                    self.pushes.append(push)
                body = {"table": table.name, "ids": ids.tolist(), "values": values.tolist()}
                try:
                    answer = http.post("/v1/admin/rows", json=body)
                except httpx.TransportError:
                    return
                assert answer.json() == {"row_epoch": epoch}
                with self._lock:
                    self.pushes[-1] = push._replace(ended_s=time.monotonic())
                    self.ended = epoch

    def _move(self, stop: threading.Event) -> None:
        """What a sidecar does, with targets far apart; every third move drops."""
        server = ServerView.open(self.run_dir)
        block = SidecarBlock.create(self.run_dir)
        record = np.zeros((), dtype=COMMAND)
        for generation in itertools.count(1):
            record["boot_epoch"], record["generation"] = server.boot_epoch, generation
            record["alpha"] = 0.15 if generation % 2 else 0.65
            record["refill_bytes_per_s"] = 1e6
            record["drop_only"] = generation % 3 == 0
            block.write_command(record)
            if not self._goes_on(stop, generation * ANSWERS_PER_MOVE):
                return

    def _goes_on(self, stop: threading.Event, answers: int) -> bool:
        """Waits for so many answers; False when the load ends before."""

        def ended() -> bool:
            return stop.is_set() or self.lost > 0

        wait_until(lambda: ended() or len(self.answers) >= answers, f"{answers} answers", BUSY_S)
        return not ended()

    def check_answers(self) -> list[tuple[Answer, bool]]:
        """Asserts that scores and lags are right; each answer, and whether it used older rows."""
        torch.set_num_threads(1)
        reference = RowsReference.from_config(self.config)
        assert isinstance(reference, RowsReference)
        for push in self.pushes:
            reference.push(push)
        computed_at: dict[str, list[tuple[int, int]]] = {}
        checked = []
        for answer in self.answers:
            kept = computed_at.get(answer.user, [])[: answer.reused]
            assert len(kept) == answer.reused <= len(answer.items)
            tokens = len(answer.items) + len(answer.candidates) - answer.reused
            errors = {
                epoch: max_error(
                    answer.scores,
                    reference.score_at(answer, [at for at, _ in kept] + [epoch] * tokens),
                )
                for epoch in range(answer.first_epoch, answer.last_epoch + 1)
            }
            right = [epoch for epoch, error in errors.items() if error <= TOLERANCE]
            assert right, f"user {answer.user}: scores differ by {errors}"
            now = (right[0], right[-1])  # equal for these tokens: their rows did not change
            self._check_lag(answer, kept)
            new = len(answer.items) - answer.reused
            computed_at[answer.user] = kept + [now] * new
            checked.append((answer, answer.reused > 0 and kept[0][1] < right[0]))
        return checked

    def _check_lag(self, answer: Answer, kept: list[tuple[int, int]]) -> None:
        """The stated lag is the age of the first push after the oldest reused KV."""
        least = most = 0.0
        if kept:
            after = self.pushes[kept[0][1] : answer.first_epoch]
            least = answer.sent_s - after[0].ended_s if after else 0.0
            before = self.pushes[kept[0][0] : answer.last_epoch]
            most = answer.came_s - before[0].begun_s if before else 0.0
        assert least - HEADER_ROUNDING_S <= answer.lag_s <= most + HEADER_ROUNDING_S
        assert answer.lag_s <= self.config.pool.max_kv_row_lag_s + HEADER_ROUNDING_S


@pytest.fixture
def start_node() -> Iterator[Callable[[float], Node]]:
    directory = Path(tempfile.mkdtemp(prefix="hbm-"))
    try:
        with Processes(directory / "logs") as processes:
            yield lambda max_kv_row_lag_s: Node(processes, directory, max_kv_row_lag_s)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.parametrize("max_kv_row_lag_s", [0.0, 1.0])
def test_pushed_rows_under_load(
    start_node: Callable[[float], Node], max_kv_row_lag_s: float
) -> None:
    node = start_node(max_kv_row_lag_s)

    def enough() -> bool:
        """Also long enough for KV to grow older than it may."""
        return len(node.answers) >= 300 and (
            time.monotonic() - node.pushes[0].ended_s > 4 * max_kv_row_lag_s
        )

    with node.load(seed=1):
        wait_until(enough, "answers under load", BUSY_S)
    assert node.lost == 0
    checked = node.check_answers()
    assert len(node.pushes) >= 30
    assert any(answer.reused for answer, _ in checked)
    older = [answer for answer, used_older in checked if used_older]
    if max_kv_row_lag_s:
        assert older
        assert all(answer.lag_s > 0.0 for answer in older)
    else:
        assert not older
        assert all(answer.lag_s == 0.0 for answer, _ in checked)
    assert node.violations() == []


def test_server_killed_in_the_middle_of_a_batch(start_node: Callable[[float], Node]) -> None:
    """Clients lose what was in flight; what was answered is right, and the next server starts from
    its own tables, with nobody cached."""
    node = start_node(1.0)
    with node.load(seed=2):
        wait_until(lambda: len(node.answers) >= 100, "answers under load", BUSY_S)
        node.kill()
        wait_until(lambda: node.lost > 0, "a request was in flight")
    node.check_answers()
    before = ServerView.open(node.run_dir).boot_epoch
    node.start()
    assert ServerView.open(node.run_dir).boot_epoch != before
    with node.load(seed=3):
        wait_until(lambda: len(node.answers) >= 100, "answers under load", BUSY_S)
    assert node.lost == 0
    node.check_answers()
    assert node.violations() == []
