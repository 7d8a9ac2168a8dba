"""Open-loop load from inside the cluster's network, and what became of each request."""

import sys
from dataclasses import dataclass
from pathlib import Path

from hbm_load.records import Outcome, Records

from hbm_e2e.cluster import Cluster
from hbm_e2e.daemon import Daemon
from hbm_e2e.waiting import wait_for


@dataclass(frozen=True)
class Failure:
    """One request that was not answered with 2xx, as the client saw it."""

    request_id: str
    at_unix_s: float
    """When it was due."""
    outcome: str
    status: int
    """0 without an answer."""

    def __str__(self) -> str:
        said = f"{self.outcome} {self.status}" if self.status else self.outcome
        return f"{self.request_id} due at {self.at_unix_s:.3f}: {said}"


class Client:
    """`hbm_load` on a node of our own cluster: it finds Services as pods of that node do.

    Runs in the node's network alone, so that nothing but a cut cable disturbs it. Each request has
    an id of its own; the log is the client's, not what a server says.
    """

    def __init__(self, cluster: Cluster, node: str, folder: Path) -> None:
        self._enter = cluster.node(node).place.enter
        self._folder = folder
        self._records = folder / "requests.parquet"
        self._daemon: Daemon | None = None

    def start(self, url: str, scenario: Path, seconds: float, seed: int = 1) -> None:
        """Send a scenario to `http://address:port`; its progress goes to the log."""
        self._records.unlink(missing_ok=True)
        self._daemon = Daemon(
            "client",
            [
                *(sys.executable, "-m", "hbm_load", "--url", url, "--records", self._records),
                *("--scenario", scenario, "--seconds", f"{seconds:g}", "--seed", str(seed)),
                *("--progress-s", "1"),
            ],
            self._folder,
        )
        self._daemon.start(enter=self._enter)

    def stop(self) -> Records:
        """End early and wait for the answers that are due."""
        daemon = self._running()
        daemon.stop(grace_s=30)
        wait_for(self._records.exists, 10, "the client's records", because=daemon.last_words)
        self._daemon = None
        return Records.read(self._records)

    def _running(self) -> Daemon:
        assert self._daemon is not None, "start it first"
        return self._daemon


def failures(records: Records) -> list[Failure]:
    """Requests that were sent, or should have been, and were not answered with 2xx."""
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
