"""What the documents' commands read, in a folder of its own and fitted to the cluster at hand.

The commands stay as they are written. Our own nodes have no image of the model server (torch would
take gigabytes on each): there its manifest runs the development environment instead. Nodes of an
existing cluster pull from a registry: there manifest and values name it.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hbm_e2e.cluster import AnyCluster, Cluster
from hbm_e2e.images import PROJECT, TARGETS
from hbm_e2e.overlay import with_environment

CHART_IMAGES = {"controller": "operator", **{name: name for name in TARGETS if name != "operator"}}
"""Section of the chart's values to target of the Dockerfile."""


class Checkout:
    """`charts/` and `docs/examples/` as at the root of the project."""

    def __init__(self, cluster: AnyCluster, folder: Path) -> None:
        self.folder = folder
        self._cluster = cluster
        shutil.copytree(PROJECT / "charts", folder / "charts", dirs_exist_ok=True)
        shutil.copytree(PROJECT / "docs" / "examples", folder / "docs" / "examples")
        server = folder / "docs" / "examples" / "server.yaml"
        manifests = [self.runnable(manifest) for manifest in yaml.safe_load_all(server.read_text())]
        server.write_text(yaml.safe_dump_all(manifests))
        if not isinstance(cluster, Cluster):
            self._name_the_registry()

    @property
    def chart(self) -> Path:
        return self.folder / "charts" / "hbm-partition"

    @property
    def model_server(self) -> list[dict[str, Any]]:
        """Deployment and Service of `docs/examples/server.yaml`, as they run here."""
        text = (self.folder / "docs" / "examples" / "server.yaml").read_text()
        return list(yaml.safe_load_all(text))

    def servers(
        self,
        *,
        name: str = "rank",
        replicas: int = 1,
        annotations: Mapping[str, str] | None = None,
        **user: Any,
    ) -> list[dict[str, Any]]:
        """The same two objects under another name and size; `annotations` and `user`, fields of the
        `securityContext`, are those of the pods."""
        stated = (PROJECT / "docs" / "examples" / "server.yaml").read_text()
        deployment, service = yaml.safe_load_all(stated)
        for one in (deployment, service):
            one["metadata"]["name"] = name
        labels = {"app": name}
        deployment["spec"]["replicas"] = replicas
        deployment["spec"]["selector"]["matchLabels"] = labels
        template = deployment["spec"]["template"]
        template["metadata"]["labels"].update(labels)
        template["metadata"]["annotations"] = dict(annotations or {})
        template["spec"]["securityContext"].update(user)
        service["spec"]["selector"] = labels
        return [self.runnable(deployment), service]

    def runnable(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """A Deployment of the reference server, as it can run on this cluster."""
        if manifest["kind"] != "Deployment":
            return manifest
        template = manifest["spec"]["template"]
        (container,) = template["spec"]["containers"]
        if isinstance(self._cluster, Cluster):
            # Taken out of what `offer_gpus` offers: a pod's GPU is counted, and nothing else.
            for kind in ("requests", "limits"):
                container["resources"][kind]["nvidia.com/gpu"] = "1"
        if not self._cluster.sees_this_disk:
            container["image"] = self._cluster.image("server")
            return manifest
        container["image"] = self._cluster.image("python")
        container["command"] = ["python3", "-m", "hbm_cli.main"]
        template["spec"] = with_environment(template["spec"], container["name"])
        return manifest

    def _name_the_registry(self) -> None:
        values = self.chart / "values-cpu.yaml"
        stated = yaml.safe_load(values.read_text())
        for section, target in CHART_IMAGES.items():
            repository, tag = self._cluster.image(target).rsplit(":", 1)
            stated.setdefault(section, {})["image"] = {"repository": repository}
            stated.setdefault("image", {})["tag"] = tag
        values.write_text(yaml.safe_dump(stated))
