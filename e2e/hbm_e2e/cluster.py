"""Three nodes on this machine, or a cluster that exists already: the same tests run on both."""

import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Protocol

from hbm_e2e import dns, node_init
from hbm_e2e.cgroups import Cgroups
from hbm_e2e.control_plane import ControlPlane, Endpoints, Flags
from hbm_e2e.daemon import Daemon
from hbm_e2e.doorway import Doorway
from hbm_e2e.errors import HarnessError
from hbm_e2e.images import REPOSITORY, TAG, Image, ImageStore, cluster_images, image_name
from hbm_e2e.kubectl import Helm, Kubectl, run
from hbm_e2e.network import Network
from hbm_e2e.node import Node
from hbm_e2e.places import cache_dir
from hbm_e2e.requirements import machine_memory_bytes, require
from hbm_e2e.toolchain import Toolchain
from hbm_e2e.waiting import wait_for

NODES = 3
API_PORT = 6443


def node_name(number: int) -> str:
    return f"n{number}"


class AnyCluster(Protocol):
    """What a test may use wherever the cluster is."""

    @property
    def kubectl(self) -> Kubectl: ...
    @property
    def helm(self) -> Helm: ...
    @property
    def sees_this_disk(self) -> bool:
        """Whether its nodes have this machine's folders, for pods to mount."""
        ...

    def image(self, name: str) -> str:
        """The name under which pods find the image of a target such as `operator`."""
        ...


class ExistingCluster:
    """Someone's cluster, by `KUBECONFIG`; its nodes pull the images from `HBM_E2E_REPOSITORY`."""

    def __init__(self, toolchain: Toolchain | None = None) -> None:
        self._toolchain = toolchain or Toolchain()
        named = os.environ.get("KUBECONFIG")
        if not named or not Path(named).is_file():
            raise HarnessError(
                f"CLUSTER=existing needs KUBECONFIG to name one file (it is {named!r})"
            )
        self.kubeconfig = Path(named).absolute()
        self.sees_this_disk = os.environ.get("HBM_E2E_SERVER") == "environment"

    @cached_property
    def kubectl(self) -> Kubectl:
        return Kubectl(shutil.which("kubectl") or self._toolchain.path("kubectl"), self.kubeconfig)

    @cached_property
    def helm(self) -> Helm:
        program = shutil.which("helm") or self._toolchain.path("helm")
        return Helm(program, self.kubeconfig, cache_dir() / "helm")

    def image(self, name: str) -> str:
        repository = os.environ.get("HBM_E2E_REPOSITORY", REPOSITORY)
        return f"{repository}/{name}:{os.environ.get('HBM_E2E_TAG', TAG)}"


class Cluster:
    """Control plane and nodes in namespaces of this machine.

    All state lies in one folder of the cache; `down` removes what `up` made and nothing else. Any
    process of the machine may hold a `Cluster` of the same name: the state is on disk.
    """

    sees_this_disk = True

    def __init__(
        self,
        name: str = "",
        toolchain: Toolchain | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.name = name or os.environ.get("HBM_E2E_NAME", "hbm-e2e")
        self.folder = cache_dir() / "clusters" / self.name
        self.images = ImageStore()
        self._toolchain = toolchain or Toolchain()
        self._say = say
        self.network = Network(self.name, NODES)
        self._gpus_per_node = 0

    @cached_property
    def control_plane(self) -> ControlPlane:
        control = self.network.control
        return ControlPlane(
            self.folder,
            self._toolchain,
            Endpoints(control.address, API_PORT),
            enter=control.enter,
            public_url=f"https://127.0.0.1:{self._api_door.port}",
            flags=Flags(
                # A dead node is seen in about ten seconds instead of fifty.
                controller_manager=(
                    "--node-monitor-period=1s",
                    "--node-monitor-grace-period=12s",
                )
            ),
        )

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(
            Node(
                node_name(number),
                self._node_folder(number),
                place,
                self.network,
                self.control_plane,
                self._toolchain,
                cluster=self.name,
                reserved_memory_bytes=machine_memory_bytes() * (NODES - 1) // NODES,
            )
            for number, place in enumerate(self.network.nodes, 1)
        )

    @property
    def kubeconfig(self) -> Path:
        """Cluster administrator; works from anywhere on this machine."""
        return self.control_plane.kubeconfig

    @property
    def kubectl(self) -> Kubectl:
        return self.control_plane.kubectl

    @cached_property
    def helm(self) -> Helm:
        return Helm(self._toolchain.path("helm"), self.kubeconfig, self.folder / "helm")

    def image(self, name: str) -> str:
        return image_name(name)

    def node(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise HarnessError(f"no node {name!r} (there are {', '.join(n.name for n in self.nodes)})")

    def run(self, *command: str, timeout_s: float = 120) -> str:
        """Run a command beside the control plane: it reaches nodes, node ports and pods."""
        return run([*self.network.control.enter, *command], timeout_s=timeout_s)

    def door(self, address: str, port: int) -> int:
        """A loopback port of this machine that leads to an address of the cluster's network."""
        return Doorway(self.folder, self.network.control, address, port).open()

    def is_up(self) -> bool:
        """Whether every part of it runs and answers."""
        if self._toolchain.missing() or not self.network.control.path.exists():
            return False
        return not self.dead() and self.kubectl.ready()

    def dead(self) -> list[Daemon]:
        """The daemons that should run and do not."""
        daemons = [*self.control_plane.daemons, self._api_door.daemon]
        for node in self.nodes:
            daemons += node.daemons
        return [daemon for daemon in daemons if not daemon.alive]

    def up(self, images: Iterable[Image] = ()) -> None:
        """A fresh cluster, unless it runs; in both cases its nodes have `images` afterwards."""
        require(self._say)
        self._toolchain.build(say=self._say)
        if self.is_up():
            self.load([*cluster_images(self.images, self._toolchain), *images])
            self._start_dns()
            return
        self.down()
        started = time.monotonic()
        needed = [*cluster_images(self.images, self._toolchain), *images]
        self._say(f"{time.monotonic() - started:5.1f} s  images of the cluster")
        self.network.up()
        self._api_door.open()
        plane = self.control_plane
        plane.start(plane.etcd, plane.api_server)
        with ThreadPoolExecutor(NODES) as pool:
            booting = [pool.submit(self._boot, node, needed) for node in self.nodes]
            plane.wait_ready()
            self._say(f"{time.monotonic() - started:5.1f} s  API server")
            plane.start(plane.controller_manager, plane.scheduler)
            for boot in booting:
                boot.result()
        self._say(f"{time.monotonic() - started:5.1f} s  images on the nodes")
        for node in self.nodes:
            node.join()
        self.wait_nodes_ready()
        self._say(f"{time.monotonic() - started:5.1f} s  nodes")
        for daemon in self.dead():
            raise HarnessError(f"{daemon.name} died: {daemon.last_words()}")
        self._start_dns()
        self._say(f"{time.monotonic() - started:5.1f} s  names")

    def down(self) -> None:
        """Stop everything and forget it; built programs and loaded images stay.

        Goes by what is on disk, so it also removes what other versions of the programs left.
        """
        for pid_file in sorted((self.folder / "run").glob("*.pid")):
            # Nothing of the state is kept, so a graceful end would only take time.
            Daemon(pid_file.stem, [], self.folder).kill()
        self.network.down()
        for number in range(1, NODES + 1):
            Cgroups(self.name, node_name(number)).remove()
            for part in node_init.PRIVATE:
                if part != "containerd":
                    shutil.rmtree(self._node_folder(number) / part, ignore_errors=True)
        for part in ("etcd", "helm", "logs", "pki", "prometheus", "run"):
            shutil.rmtree(self.folder / part, ignore_errors=True)
        for made in ("control_plane", "nodes", "_api_door"):
            self.__dict__.pop(made, None)

    def repair(self) -> None:
        """Start what was killed or switched off; until all nodes are Ready."""
        plane = self.control_plane
        self._api_door.open()
        plane.start(plane.etcd, plane.api_server, plane.controller_manager, plane.scheduler)
        plane.wait_ready()
        for node in self.nodes:
            node.power_on()
            node.start_containerd()
            node.join()
        self.wait_nodes_ready()
        if self._gpus_per_node:
            self.offer_gpus(self._gpus_per_node)

    def load(self, images: Iterable[Image]) -> None:
        """Import images into every node that lacks them."""
        wanted = list(images)
        with ThreadPoolExecutor(NODES) as pool:
            for loading in [pool.submit(node.load, wanted) for node in self.nodes]:
                loading.result()

    def wait_nodes_ready(self, timeout_s: float = 120) -> None:
        wait_for(
            lambda: self.ready_nodes() == {node.name for node in self.nodes},
            timeout_s,
            "all nodes to be Ready",
            every_s=0.5,
            because=lambda: f"Ready are {sorted(self.ready_nodes())}",
        )

    def ready_nodes(self) -> set[str]:
        return {
            node["metadata"]["name"]
            for node in self.kubectl.items("nodes")
            for condition in node["status"].get("conditions", ())
            if condition["type"] == "Ready" and condition["status"] == "True"
        }

    def offer_gpus(self, per_node: int) -> None:
        """`nvidia.com/gpu` on every node. A kubelet that starts takes them back; `repair` offers
        as many again."""
        self._gpus_per_node = per_node
        for node in self.nodes:
            patch = "".join(
                f'{{"op":"add","path":"/status/{kind}/nvidia.com~1gpu","value":"{per_node}"}},'
                for kind in ("capacity", "allocatable")
            )
            self.kubectl(
                *("patch", "node", node.name, "--subresource=status", "--type=json"),
                *("-p", f"[{patch.rstrip(',')}]"),
            )

    @cached_property
    def _api_door(self) -> Doorway:
        control = self.network.control
        return Doorway(self.folder, control, control.address, API_PORT)

    def _node_folder(self, number: int) -> Path:
        return self.folder / "nodes" / node_name(number)

    def _start_dns(self) -> None:
        self.kubectl.apply(*dns.manifests())
        self.kubectl.within("kube-system").wait_ready("deployment/coredns")

    def _boot(self, node: Node, images: list[Image]) -> None:
        node.power_on()
        node.forget_containers()
        node.load(images)
