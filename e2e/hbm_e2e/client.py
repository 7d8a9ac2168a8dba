"""Open-loop load from inside the cluster's network, and what became of each request."""

import json
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hbm_load.records import Outcome, Records

from hbm_e2e.cluster import Cluster
from hbm_e2e.daemon import Daemon
from hbm_e2e.errors import HarnessError
from hbm_e2e.kubectl import Kubectl
from hbm_e2e.waiting import wait_for

SCENARIO_S = 3600
"""Of a trace: more than any test lasts; what is left when it is stopped was never sent."""


_SERVING = re.compile(r"Starting to serve on (\S+)")


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


class Client(ABC):
    """`hbm_load` on this machine, and the way from it to a Service.

    Each request has an id of its own; the log is the client's, not what a server says.
    """

    def __init__(self, folder: Path, enter: Sequence[str] = ()) -> None:
        self._folder = folder
        self._enter = enter

    @abstractmethod
    def way_to(self, kubectl: Kubectl, service: str) -> AbstractContextManager[str]:
        """The URL at which the client finds a Service of the runner's namespace meanwhile."""

    @contextmanager
    def sending(self, kubectl: Kubectl, service: str, scenario: Path) -> Iterator[Sent]:
        """Send a scenario to a Service meanwhile; ends with the last due answer."""
        with self.way_to(kubectl, service) as url, self._loading(url, scenario) as sent:
            yield sent

    @contextmanager
    def _loading(self, url: str, scenario: Path) -> Iterator[Sent]:
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


class NodeClient(Client):
    """On a node of our own cluster: it finds Services as pods of that node do.

    In the node's network alone, so that nothing but a cut cable disturbs it. Its records lie with
    the logs of the cluster's daemons: a bundle has them.
    """

    def __init__(self, cluster: Cluster, node: str) -> None:
        super().__init__(cluster.folder, cluster.node(node).place.enter)

    @contextmanager
    def way_to(self, kubectl: Kubectl, service: str) -> Iterator[str]:
        """Its address inside the cluster."""
        spec = kubectl.get("service", service)["spec"]
        yield f"http://{spec['clusterIP']}:{spec['ports'][0]['port']}"


class ProxyClient(Client):
    """Outside of anybody's cluster, through the proxy of its API server."""

    @contextmanager
    def way_to(self, kubectl: Kubectl, service: str) -> Iterator[str]:
        """A loopback port where kubectl speaks for us."""
        proxy = Daemon("kubectl-proxy", kubectl.command("proxy", "--port=0"), self._folder)
        proxy.log.unlink(missing_ok=True)
        proxy.start()
        try:
            address = wait_for(
                lambda: _SERVING.search(proxy.log.read_text()),
                20,
                "kubectl proxy",
                because=proxy.last_words,
            )[1]
            namespace = kubectl.namespace or "default"
            yield (f"http://{address}/api/v1/namespaces/{namespace}/services/{service}:http/proxy")
        finally:
            proxy.stop()


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
