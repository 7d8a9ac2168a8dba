"""Open-loop load from inside the cluster's network, and what became of each request."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hbm_load.records import Outcome, Records

from hbm_e2e.cluster import Cluster
from hbm_e2e.daemon import Daemon
from hbm_e2e.errors import HarnessError
from hbm_e2e.waiting import wait_for

SCENARIO_S = 3600
"""Of a trace: more than any test lasts; what is left when it is stopped was never sent."""


@dataclass(frozen=True)
class Failure:
    """One request that was not answered with 2xx, as the client saw it."""

    request_id: str
    due_unix_s: float
    outcome: str
    status: int
    """0 without an answer."""

    def __str__(self) -> str:
        said = f"{self.outcome} {self.status}" if self.status else self.outcome
        return f"{self.request_id} due at {self.due_unix_s:.3f}: {said}"


@dataclass
class Sent:
    """What was sent while a `Client.sending` lasted; complete when it has ended."""

    log: Path
    answered: int = 0
    failures: list[Failure] = field(default_factory=list)

    def nodes(self) -> dict[str, int]:
        """Pod uid to answers from it so far; about a second behind."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        for line in reversed(lines):
            try:
                counted: dict[str, int] = json.loads(line)["nodes"]
            except ValueError:
                continue  # being written
            return counted
        return {}


class Client:
    """`hbm_load` on a node of our own cluster: it finds Services as pods of that node do.

    Runs in the node's network alone, so that nothing but a cut cable disturbs it. Each request has
    an id of its own; the log is the client's, not what a server says. It lies with the logs of the
    cluster's daemons, so a bundle has it.
    """

    def __init__(self, cluster: Cluster, node: str) -> None:
        self._enter = cluster.node(node).place.enter
        self._folder = cluster.folder

    @contextmanager
    def sending(self, url: str, scenario: Path) -> Iterator[Sent]:
        """Send a scenario to `http://address:port` meanwhile; ends with the last due answer."""
        run = f"client-{time.strftime('%H%M%S')}-{scenario.stem}"
        records = self._folder / "logs" / f"{run}.parquet"
        daemon = Daemon(
            run,
            [
                *(sys.executable, "-m", "hbm_load", "--url", url, "--records", str(records)),
                *("--scenario", str(scenario), "--seconds", str(SCENARIO_S), "--progress-s", "1"),
            ],
            self._folder,
        )
        sent = Sent(daemon.log)
        daemon.start(enter=self._enter)
        try:
            wait_for(sent.nodes, 60, "the first answer", because=daemon.last_words)
            yield sent
            if not daemon.alive:
                raise HarnessError(f"the client died: {daemon.last_words()}")
        finally:
            daemon.stop(grace_s=30)
        found = Records.read(records)
        sent.answered = int(found.ok.sum())
        sent.failures = failures(found)


def failures(records: Records) -> list[Failure]:
    """Requests that were due and not answered with 2xx."""
    start = records.meta["start_unix_s"]
    return [
        Failure(
            records.request_id[index],
            start + float(records.intended_s[index]),
            str(outcome),
            int(records.status[index]),
        )
        for index, outcome in enumerate(records.outcome)
        if outcome not in (Outcome.OK, Outcome.NOT_SENT)
    ]
