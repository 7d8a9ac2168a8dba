"""One node: real kubelet, containerd and kube-proxy in namespaces of their own."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hbm_e2e import node_init
from hbm_e2e.cgroups import Cgroups
from hbm_e2e.control_plane import ControlPlane
from hbm_e2e.daemon import Daemon
from hbm_e2e.errors import HarnessError
from hbm_e2e.images import PAUSE, Image
from hbm_e2e.kubectl import run
from hbm_e2e.network import POD_RANGE, Network, Place
from hbm_e2e.toolchain import Toolchain
from hbm_e2e.waiting import wait_for

CLUSTER_DNS = "10.96.0.10"
PROXY_METRICS_PORT = 10249
KUBELET_PORT = 10250


class Node:
    """Power it on and off, kill and restart its daemons, run commands inside."""

    def __init__(
        self,
        name: str,
        folder: Path,
        place: Place,
        network: Network,
        plane: ControlPlane,
        toolchain: Toolchain,
        *,
        cluster: str,
        reserved_memory_bytes: int,
    ) -> None:
        self.name = name
        self.place = place
        self.folder = folder
        self._network = network
        self._plane = plane
        self._toolchain = toolchain
        self._cgroups = Cgroups(cluster, name)
        self._reserved_memory_bytes = reserved_memory_bytes
        self._imported = self.folder / "images.json"
        self._containerd_config = self.folder / "containerd.toml"
        self._kubelet_config = self.folder / "kubelet.json"
        self._proxy_config = self.folder / "kube-proxy.json"
        self._kubelet_kubeconfig = self.folder / "kubelet.kubeconfig"
        self._proxy_kubeconfig = self.folder / "kube-proxy.kubeconfig"
        self.holder = self._daemon(
            "holder",
            [
                *("unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"),
                *(sys.executable, "-I", node_init.__file__, self.folder),
            ],
        )
        self.containerd = self._daemon(
            "containerd", ["containerd", "--config", self._containerd_config]
        )
        self.kubelet = self._daemon(
            "kubelet",
            [
                toolchain.path("kubelet"),
                f"--config={self._kubelet_config}",
                f"--kubeconfig={self._kubelet_kubeconfig}",
                f"--hostname-override={name}",
                f"--node-ip={place.address}",
            ],
        )
        self.proxy = self._daemon(
            "kube-proxy", [toolchain.path("kube-proxy"), f"--config={self._proxy_config}"]
        )

    @property
    def powered(self) -> bool:
        return self.holder.alive

    @property
    def daemons(self) -> tuple[Daemon, ...]:
        return self.holder, self.containerd, self.kubelet, self.proxy

    @property
    def enter(self) -> tuple[str, ...]:
        """Words before a command that shall run inside the node."""
        pid = self.holder.pid
        if pid is None:
            raise HarnessError(f"node {self.name} has no power")
        return ("nsenter", "--target", str(pid), "--net", "--mount", "--pid", "--")

    def run(self, *command: str, timeout_s: float = 120) -> str:
        return run([*self.enter, *command], timeout_s=timeout_s)

    def power_on(self) -> None:
        """Namespaces and containerd; the disk (images, pods, logs) is as it was left."""
        if self.powered:
            return
        self._cgroups.make()
        if not self.place.path.exists():
            self._network.attach(self.place)
        self._write_configuration()
        powered = self.folder / "powered"
        powered.unlink(missing_ok=True)
        self.holder.start(enter=self.place.enter, forks=True)
        wait_for(powered.exists, 20, f"node {self.name}", because=self.holder.last_words)
        self.start_containerd()

    def start_containerd(self) -> None:
        self.containerd.start(enter=self.enter, forks=True)
        wait_for(
            self._containerd_answers,
            20,
            f"containerd of {self.name}",
            because=self.containerd.last_words,
        )

    def join(self) -> None:
        """Start the kubelet and the proxy: the node registers, or reports again."""
        self.start_kubelet()
        self.proxy.start(enter=self.enter, forks=True)

    def start_kubelet(self) -> None:
        self.kubelet.start(enter=self.enter, forks=True)

    def power_off(self) -> None:
        """Everything on the node ends at once, and its cable is cut; the disk stays."""
        self.holder.kill()  # is gone only after all that lived in its namespace
        self._network.detach(self.place)

    def forget_containers(self) -> None:
        """Drop what an earlier cluster of this name left in containerd beside its images."""
        ctr = ("ctr", "--namespace", "k8s.io")
        left = self.run(*ctr, "containers", "list", "--quiet").split()
        if left:
            self.run(*ctr, "containers", "delete", *left)
            self.containerd.stop()
            self.start_containerd()

    def load(self, images: Iterable[Image]) -> None:
        """Import what this node's containerd does not have yet."""
        try:
            known = json.loads(self._imported.read_text())
        except (OSError, ValueError):
            known = {}
        for image in images:
            if known.get(image.name) != image.id:
                self._import(image)
                known[image.name] = image.id
                self._imported.write_text(json.dumps(known, indent=1))

    def _import(self, image: Image) -> None:
        command = ("ctr", "--namespace", "k8s.io", "images", "import", str(image.archive))
        try:
            self.run(*command, timeout_s=900)
        except HarnessError as error:
            # The image takes the place of another one: layers that both share may be collected
            # as the old one's while the new one is unpacked. They are there the next time.
            if "does not exist" not in str(error):
                raise
            self.run(*command, timeout_s=900)

    def _containerd_answers(self) -> bool:
        try:
            self.run("ctr", "version", timeout_s=10)
        except HarnessError:
            return False
        return True

    def _daemon(self, name: str, command: list[str | Path]) -> Daemon:
        return Daemon(f"{self.name}-{name}", command, self._plane.folder)

    def _write_configuration(self) -> None:
        pki = self._plane.pki
        self.folder.mkdir(parents=True, exist_ok=True)
        kubelet = pki.issue(
            f"kubelet-{self.name}",
            f"/O=system:nodes/CN=system:node:{self.name}",
            [f"DNS:{self.name}", f"IP:{self.place.address}", "IP:127.0.0.1"],
        )
        url = self._plane.endpoints.url
        pki.kubeconfig(self._kubelet_kubeconfig, url, kubelet)
        pki.kubeconfig(
            self._proxy_kubeconfig, url, pki.issue("kube-proxy", "/CN=system:kube-proxy")
        )
        resolv = self.folder / "resolv.conf"
        resolv.write_text("nameserver 172.31.0.1\n")  # nobody answers there: nothing is outside
        self._containerd_config.write_text(CONTAINERD.format(pause=PAUSE))
        (self.folder / "cni-config").mkdir(exist_ok=True)
        (self.folder / "cni-config" / "10-e2e.conflist").write_text(json.dumps(self._cni()))
        self._kubelet_config.write_text(
            json.dumps(
                {
                    "apiVersion": "kubelet.config.k8s.io/v1beta1",
                    "kind": "KubeletConfiguration",
                    "authentication": {
                        "anonymous": {"enabled": False},
                        "webhook": {"enabled": True},
                        "x509": {"clientCAFile": str(pki.ca.certificate)},
                    },
                    "authorization": {"mode": "Webhook"},
                    "tlsCertFile": str(kubelet.certificate),
                    "tlsPrivateKeyFile": str(kubelet.key),
                    "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
                    "clusterDNS": [CLUSTER_DNS],
                    "clusterDomain": "cluster.local",
                    "resolvConf": str(resolv),
                    "failCgroupV1": False,
                    "cgroupDriver": "cgroupfs",
                    "cgroupRoot": self._cgroups.path,
                    "enforceNodeAllocatable": [],
                    "failSwapOn": False,
                    # Three nodes share one machine's memory.
                    "systemReserved": {"memory": str(self._reserved_memory_bytes)},
                    "evictionHard": {
                        "memory.available": "100Mi",
                        "nodefs.available": "1%",
                        "imagefs.available": "1%",
                    },
                    "imageGCHighThresholdPercent": 100,
                    # A dead node is seen after 12 s: report often enough for a busy machine.
                    "nodeLeaseDurationSeconds": 16,
                    "nodeStatusUpdateFrequency": "4s",
                }
            )
        )
        self._proxy_config.write_text(
            json.dumps(
                {
                    "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                    "kind": "KubeProxyConfiguration",
                    "clientConnection": {"kubeconfig": str(self._proxy_kubeconfig)},
                    "mode": "iptables",
                    "clusterCIDR": POD_RANGE,
                    "hostnameOverride": self.name,
                    "bindAddress": self.place.address,
                    "healthzBindAddress": "127.0.0.1:10256",
                    "metricsBindAddress": f"0.0.0.0:{PROXY_METRICS_PORT}",
                    "conntrack": {"maxPerCore": 0},
                }
            )
        )

    def _cni(self) -> dict[str, Any]:
        return {
            "cniVersion": "0.4.0",
            "name": "e2e",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": "cni0",
                    "isGateway": True,
                    "ipMasq": False,  # else pods of other nodes see the node's address
                    "hairpinMode": True,
                    "ipam": {
                        "type": "host-local",
                        "ranges": [[{"subnet": self.place.pod_range}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": True}},
            ],
        }


CONTAINERD = """\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  # Without CAP_SYS_RESOURCE nobody may lower an OOM score.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = "/usr/sbin/runc"
"""
