"""Debian's Prometheus beside the control plane, told its targets through files."""

import json
import re
import shutil
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hbm_e2e.cluster import Cluster
from hbm_e2e.daemon import Daemon
from hbm_e2e.errors import HarnessError
from hbm_e2e.node import KUBELET_PORT, PROXY_METRICS_PORT
from hbm_e2e.waiting import wait_for

PORT = 9090
POD_LABEL = "__meta_kubernetes_pod_label_"

# The machine's HTTP proxy, if it has one, knows nothing of a loopback port.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Job:
    """Pods that are scraped alike, as one endpoint of a PodMonitor says it."""

    name: str
    port: str
    """Name of the container port that serves `/metrics`."""
    selector: str
    """Of labels, as kubectl takes it."""
    namespaces: tuple[str, ...] = ()
    """Empty: all."""
    honour_labels: bool = False
    """Series keep labels of their own that are also those of their pod."""
    from_pod_labels: Mapping[str, str] = field(default_factory=dict)
    """Label of the series to label of the pod."""


class Prometheus:
    """Scrapes the nodes (cAdvisor, kube-proxy) and the pods it is shown.

    Debian's build knows no Kubernetes discovery: `follow` names a job as a PodMonitor does, and
    `refresh` writes the present pods' addresses with the labels a PodMonitor gives.
    """

    def __init__(self, cluster: Cluster, rules: Iterable[Path] = (), interval: str = "2s") -> None:
        self._cluster = cluster
        self._folder = cluster.folder / "prometheus"
        self._targets = self._folder / "targets"
        self._rules = [str(rule) for rule in rules]
        self._interval = interval
        self._jobs: list[Job] = []
        self.daemon = Daemon(
            "prometheus",
            [
                "prometheus",
                f"--config.file={self._folder / 'prometheus.json'}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                f"--web.listen-address={cluster.network.control.address}:{PORT}",
                "--web.enable-lifecycle",
                "--log.level=warn",
            ],
            cluster.folder,
        )
        self._url = ""

    def start(self) -> None:
        """From an empty store."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
        for honour in (False, True):
            self._folder_of(honour).mkdir(parents=True)
        (self._folder / "prometheus.json").write_text(json.dumps(self._configuration()))
        self.daemon.start(enter=self._cluster.network.control.enter)
        door = self._cluster.door(self._cluster.network.control.address, PORT)
        self._url = f"http://127.0.0.1:{door}"
        wait_for(self._ready, 30, "Prometheus", because=self.daemon.last_words)

    def stop(self) -> None:
        self.daemon.stop()

    def follow(self, *jobs: Job) -> None:
        """Scrape these from now on, at the pods that there are at each `refresh`."""
        self._jobs += jobs
        self.refresh()

    def refresh(self) -> None:
        """Write the addresses of the pods that exist now; Prometheus reads them by itself."""
        for job in self._jobs:
            kubectl, words = self._cluster.kubectl, ("-l", job.selector)
            pods = [
                pod
                for namespace in job.namespaces or ("",)
                for pod in kubectl.items(
                    "pods", *(("-n", namespace) if namespace else ("-A",)), *words
                )
            ]
            targets = [target for pod in pods for target in _targets(job, pod)]
            folder = self._folder_of(job.honour_labels)
            unfinished = folder / f"{job.name}.unfinished"
            unfinished.write_text(json.dumps(targets))
            unfinished.rename(folder / f"{job.name}.json")

    @contextmanager
    def keeping_up(self, every_s: float = 2) -> Iterator[None]:
        """Refresh again and again meanwhile: pods come and go."""
        over = threading.Event()

        def run() -> None:
            while not over.wait(every_s):
                try:
                    self.refresh()
                except HarnessError:
                    continue  # no API server just now

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query: a vector's samples or a scalar's; errors are raised."""
        question = urllib.parse.urlencode({"query": expression})
        result = self._get(f"/api/v1/query?{question}")["data"]
        samples: list[dict[str, Any]] = (
            [{"metric": {}, "value": result["result"]}]
            if result["resultType"] == "scalar"
            else result["result"]
        )
        return samples

    def query_range(
        self, expression: str, start: float, end: float, step_s: float
    ) -> list[dict[str, Any]]:
        """The series of a range query; times in seconds since the epoch."""
        question = urllib.parse.urlencode(
            {"query": expression, "start": start, "end": end, "step": step_s}
        )
        series: list[dict[str, Any]] = self._get(f"/api/v1/query_range?{question}")["data"][
            "result"
        ]
        return series

    def up_targets(self, job: str) -> int:
        """How many targets of a job answered their last scrape."""
        return len(self.query(f'up{{job="{job}"}} == 1'))

    def alerts(self) -> list[dict[str, Any]]:
        """Pending and firing alerts."""
        alerts: list[dict[str, Any]] = self._get("/api/v1/alerts")["data"]["alerts"]
        return alerts

    def _get(self, path: str) -> Any:
        try:
            with _direct.open(self._url + path, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise HarnessError(f"Prometheus refused {path}: {error.read().decode()}") from error

    def _ready(self) -> bool:
        try:
            with _direct.open(self._url + "/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _folder_of(self, honour_labels: bool) -> Path:
        return self._targets / ("honouring" if honour_labels else "plain")

    def _configuration(self) -> Mapping[str, Any]:
        pki = self._cluster.control_plane.pki
        admin = pki.issue("admin", "/O=system:masters/CN=admin")
        nodes = [node.place.address for node in self._cluster.nodes]
        return {
            "global": {
                "scrape_interval": self._interval,
                "scrape_timeout": self._interval,
                "evaluation_interval": self._interval,
            },
            "rule_files": self._rules,
            "scrape_configs": [
                *(
                    {
                        "job_name": f"pods-{honour}",
                        "honor_labels": honour,
                        "file_sd_configs": [{"files": [str(self._folder_of(honour) / "*.json")]}],
                    }
                    for honour in (False, True)
                ),
                {
                    "job_name": "kube-proxy",
                    "static_configs": [
                        {"targets": [f"{address}:{PROXY_METRICS_PORT}" for address in nodes]}
                    ],
                },
                {
                    "job_name": "cadvisor",
                    "scheme": "https",
                    "metrics_path": "/metrics/cadvisor",
                    "tls_config": {
                        "ca_file": str(pki.ca.certificate),
                        "cert_file": str(admin.certificate),
                        "key_file": str(admin.key),
                    },
                    "static_configs": [
                        {"targets": [f"{address}:{KUBELET_PORT}" for address in nodes]}
                    ],
                },
            ],
        }


def jobs_of(monitors: Iterable[Mapping[str, Any]]) -> list[Job]:
    """What PodMonitors ask for: one job per endpoint of each."""
    jobs = []
    for monitor in monitors:
        spec, metadata = monitor["spec"], monitor["metadata"]
        chosen = spec["selector"]
        labels = [f"{key}={value}" for key, value in chosen.get("matchLabels", {}).items()]
        for rule in chosen.get("matchExpressions", ()):
            assert rule["operator"] == "In", rule
            labels.append(f"{rule['key']} in ({','.join(rule['values'])})")
        where = spec.get("namespaceSelector", {"matchNames": [metadata["namespace"]]})
        for number, endpoint in enumerate(spec["podMetricsEndpoints"]):
            jobs.append(
                Job(
                    f"{metadata['name']}-{number}",
                    endpoint["port"],
                    ",".join(labels),
                    () if where.get("any") else tuple(where["matchNames"]),
                    endpoint.get("honorLabels", False),
                    {
                        rule["targetLabel"]: rule["sourceLabels"][0].removeprefix(POD_LABEL)
                        for rule in endpoint.get("relabelings", ())
                    },
                )
            )
    return jobs


def _targets(job: Job, pod: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A pod's scrape targets with the labels that the Prometheus operator attaches."""
    address = pod["status"].get("podIP")
    if not address or pod["status"]["phase"] != "Running":
        return []
    spec, metadata = pod["spec"], pod["metadata"]
    # Discovery knows labels by names in which all but letters and digits is an underscore.
    labels = {re.sub(r"\W", "_", key): value for key, value in metadata.get("labels", {}).items()}
    return [
        {
            "targets": [f"{address}:{port['containerPort']}"],
            "labels": {
                "job": job.name,
                "namespace": metadata["namespace"],
                "pod": metadata["name"],
                "container": container["name"],
                "endpoint": job.port,
                **{name: labels.get(key, "") for name, key in job.from_pod_labels.items()},
            },
        }
        for container in (*spec.get("initContainers", ()), *spec["containers"])
        for port in container.get("ports", ())
        if port.get("name") == job.port
    ]
