"""The cluster's network: namespaces joined by a bridge, with no way out."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from hbm_e2e.kubectl import run

CONTROL_ADDRESS = "172.31.0.1"
BRIDGE_ADDRESS = "02:00:00:00:00:01"
SERVICE_RANGE = "10.96.0.0/16"
POD_RANGE = "10.244.0.0/16"


@dataclass(frozen=True)
class Place:
    """One network namespace and its address on the bridge."""

    namespace: str
    address: str
    pod_range: str | None = None

    @property
    def path(self) -> Path:
        return Path("/run/netns") / self.namespace

    @property
    def enter(self) -> tuple[str, ...]:
        """Words before a command. Not `ip netns exec`: that hides the cgroups by a fresh /sys."""
        return ("nsenter", f"--net={self.path}")


class Network:
    """A star: the bridge lies in the control plane's namespace, each node hangs on it by a veth.

    Nothing joins the machine's own namespace, so a packet to anywhere else finds no route.
    """

    def __init__(self, name: str, nodes: int) -> None:
        self.control = Place(f"{name}-cp", CONTROL_ADDRESS)
        self.nodes = tuple(
            Place(f"{name}-n{i}", f"172.31.0.{10 + i}", f"10.244.{i}.0/24")
            for i in range(1, nodes + 1)
        )

    def up(self) -> None:
        """From nothing; call `down` first if some of it may exist."""
        control = self.control
        run(["ip", "netns", "add", control.namespace])
        _ip(control, "link set lo up")
        # Else it takes that of a cable and changes it with the cables: all nodes would lose sight
        # of the API server when one is cut.
        _ip(control, f"link add br0 address {BRIDGE_ADDRESS} type bridge")
        _ip(control, f"addr add {control.address}/24 dev br0")
        _ip(control, "link set br0 up")
        # Never used, but the packet must find a route before its Service address is rewritten.
        _ip(control, f"route add {SERVICE_RANGE} dev br0")
        _forward(control)
        for node in self.nodes:
            _ip(control, f"route add {node.pod_range} via {node.address}")
            self.attach(node)

    def attach(self, node: Place) -> None:
        """Plug a node in: a namespace with one cable and the routes to everybody's pods."""
        plug = f"v{node.address.rsplit('.', 1)[1]}"
        run(["ip", "netns", "add", node.namespace])
        _ip(self.control, f"link add {plug} type veth peer name eth0 netns {node.namespace}")
        _ip(self.control, f"link set {plug} master br0 up")
        _ip(node, "link set lo up")
        _ip(node, f"addr add {node.address}/24 dev eth0")
        _ip(node, "link set eth0 up")
        _ip(node, f"route add default via {self.control.address}")
        for other in self.nodes:
            if other is not node:
                _ip(node, f"route add {other.pod_range} via {other.address}")
        _forward(node)

    def detach(self, node: Place) -> None:
        """Unplug a node; its cable, routes, connections and packet filters are gone."""
        if not node.path.exists():
            return
        # The namespace itself lives on while a dying process holds it: cut the cable first.
        subprocess.run([*node.enter, "ip", "link", "del", "eth0"], capture_output=True, check=False)
        run(["ip", "netns", "del", node.namespace])

    def down(self) -> None:
        for place in (*self.nodes, self.control):
            self.detach(place)


def _ip(place: Place, words: str) -> None:
    run([*place.enter, "ip", *words.split()])


def _forward(place: Place) -> None:
    run([*place.enter, "sysctl", "-qw", "net.ipv4.ip_forward=1"])
