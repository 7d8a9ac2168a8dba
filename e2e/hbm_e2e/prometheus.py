"""Debian's Prometheus beside the control plane, told its targets through files."""

import json
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hbm_e2e.cluster import Cluster
from hbm_e2e.daemon import Daemon
from hbm_e2e.errors import HarnessError
from hbm_e2e.node import KUBELET_PORT, PROXY_METRICS_PORT
from hbm_e2e.waiting import wait_for

PORT = 9090

# The machine's HTTP proxy, if it has one, knows nothing of a loopback port.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


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
        self._jobs: dict[str, tuple[str, str, str]] = {}
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
        self._targets.mkdir(parents=True)
        (self._folder / "prometheus.json").write_text(json.dumps(self._configuration()))
        self.daemon.start(enter=self._cluster.network.control.enter)
        door = self._cluster.door(self._cluster.network.control.address, PORT)
        self._url = f"http://127.0.0.1:{door}"
        wait_for(self._ready, 30, "Prometheus", because=self.daemon.last_words)

    def stop(self) -> None:
        self.daemon.stop()

    def follow(self, job: str, *, namespace: str, selector: str, port: str) -> None:
        """Scrape `/metrics` at the named container port of all pods that match, from `refresh`."""
        self._jobs[job] = (namespace, selector, port)
        self.refresh()

    def refresh(self) -> None:
        """Write the addresses of the pods that exist now; Prometheus reads them by itself."""
        for job, (namespace, selector, port) in self._jobs.items():
            pods = self._cluster.kubectl.items("pods", "--namespace", namespace, "-l", selector)
            targets = [target for pod in pods for target in _targets(job, pod, port)]
            unfinished = self._targets / f"{job}.unfinished"
            unfinished.write_text(json.dumps(targets))
            unfinished.rename(self._targets / f"{job}.json")

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
                {
                    "job_name": "pods",
                    "file_sd_configs": [{"files": [str(self._targets / "*.json")]}],
                },
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


def _targets(job: str, pod: Mapping[str, Any], port_name: str) -> list[dict[str, Any]]:
    """A pod's scrape targets with the labels that the Prometheus operator attaches."""
    address = pod["status"].get("podIP")
    if not address or pod["status"]["phase"] != "Running":
        return []
    spec = pod["spec"]
    return [
        {
            "targets": [f"{address}:{port['containerPort']}"],
            "labels": {
                "job": job,
                "namespace": pod["metadata"]["namespace"],
                "pod": pod["metadata"]["name"],
                "container": container["name"],
                "endpoint": port_name,
            },
        }
        for container in (*spec.get("initContainers", ()), *spec["containers"])
        for port in container.get("ports", ())
        if port.get("name") == port_name
    ]
