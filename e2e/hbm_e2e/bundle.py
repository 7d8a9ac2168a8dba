"""What is kept of a failure: objects, events and logs, as files."""

import shutil
from pathlib import Path

from hbm_e2e.errors import HarnessError
from hbm_e2e.kubectl import Kubectl

# Read by anyone who looks at a failure: what a Secret holds is left out.
LEFT_OUT = {"secrets", "events", "events.events.k8s.io"}
LOG_LINES = "5000"


class Bundle:
    """One folder per failure; collecting never fails, what could not be had is written down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._not_had: list[str] = []

    def collect(self, kubectl: Kubectl, daemon_logs: Path | None = None) -> Path:
        """Objects of all kinds, events, logs of all containers, and the cluster's own logs."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._keep(kubectl, "nodes.txt", "get", "nodes", "-o", "wide")
        self._keep(kubectl, "pods.txt", "get", "pods", "-A", "-o", "wide")
        self._keep(kubectl, "pods-described.txt", "describe", "pods", "-A")
        self._keep(
            *(kubectl, "events.txt", "get", "events", "-A"),
            *("--sort-by=.lastTimestamp", "-o", "wide"),
        )
        self._objects(kubectl)
        self._logs(kubectl)
        if daemon_logs is not None and daemon_logs.is_dir():
            shutil.copytree(daemon_logs, self.folder / "cluster")
        if self._not_had:
            (self.folder / "missing.txt").write_text("\n".join(self._not_had) + "\n")
        return self.folder

    def _objects(self, kubectl: Kubectl) -> None:
        try:
            kinds = kubectl("api-resources", "--verbs=list", "-o", "name").split()
        except HarnessError as error:
            self._not_had.append(str(error))
            return
        for kind in kinds:
            if kind not in LEFT_OUT:
                self._keep(kubectl, f"objects/{kind}.yaml", "get", kind, "-A", "-o", "yaml")

    def _logs(self, kubectl: Kubectl) -> None:
        try:
            pods = kubectl.items("pods", "-A")
        except HarnessError as error:
            self._not_had.append(str(error))
            return
        for pod in pods:
            namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
            status = pod["status"]
            containers = (
                *status.get("initContainerStatuses", ()),
                *status.get("containerStatuses", ()),
            )
            for container in containers:
                words = ["logs", name, "-c", container["name"], f"--tail={LOG_LINES}"]
                path = f"logs/{namespace}/{name}/{container['name']}"
                here = kubectl.within(namespace)
                self._keep(here, f"{path}.log", *words)
                if container["restartCount"]:
                    self._keep(here, f"{path}.previous.log", *words, "--previous")

    def _keep(self, kubectl: Kubectl, name: str, *words: str) -> None:
        try:
            text = kubectl(*words, timeout_s=30)
        except HarnessError as error:
            self._not_had.append(str(error))
            return
        if text.strip():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
