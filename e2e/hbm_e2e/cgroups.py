"""Control groups (version 1) of one node: a folder of its own in every hierarchy."""

import os
from pathlib import Path

from hbm_e2e.errors import HarnessError

ROOT = Path("/sys/fs/cgroup")
CONTROLLERS = (
    *("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "systemd"),
)


SHARES_PER_CORE = 1024
"""Of a node, as its kubelet counts; the kernel's default for a whole group is that of one core."""


def hierarchies() -> list[Path]:
    """The version 1 hierarchies that are mounted; empty on a version 2 machine."""
    return [ROOT / name for name in CONTROLLERS if (ROOT / name / "cgroup.procs").exists()]


class Cgroups:
    """`/<cluster>/<node>` in each hierarchy."""

    def __init__(self, cluster: str, node: str) -> None:
        self.path = f"/{cluster}/{node}"
        self._cluster = cluster
        self._node = node

    def make(self) -> None:
        """Fresh groups: leftovers of a killed node would cost its kubelet seconds each."""
        for hierarchy in hierarchies():
            _remove_tree(hierarchy / self._cluster / self._node)
            group = hierarchy
            for part in (self._cluster, self._node):
                group /= part
                group.mkdir(exist_ok=True)
                if hierarchy.name == "cpuset":
                    _inherit_cpus(group)
            if hierarchy.name == "cpu":
                _weigh(group)

    def remove(self) -> None:
        """Only what is below this node's group; a group with a living process stays."""
        # The runtime makes a group beside ours in the hierarchy of systemd's version 2, if any.
        for hierarchy in (*hierarchies(), ROOT / "unified"):
            _remove_tree(hierarchy / self._cluster / self._node)
            _remove_if_empty(hierarchy / self._cluster)


def _weigh(node: Path) -> None:
    """A node weighs what its cores do, a cluster what its nodes do: else all pods together would
    get as much time on a busy machine as one process outside."""
    (node / "cpu.shares").write_text(str(SHARES_PER_CORE * (os.cpu_count() or 1)))
    together = sum(int(shares.read_text()) for shares in node.parent.glob("*/cpu.shares"))
    (node.parent / "cpu.shares").write_text(str(together))


def _inherit_cpus(group: Path) -> None:
    # A new cpuset is empty, and nothing can be started in an empty one.
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not (group / name).read_text().strip():
            (group / name).write_text((group.parent / name).read_text())


def _remove_tree(group: Path) -> None:
    if not group.is_dir():
        return
    for child in group.iterdir():
        if child.is_dir():
            _remove_tree(child)
    _remove_if_empty(group)


def _remove_if_empty(group: Path) -> None:
    try:
        group.rmdir()
    except OSError:
        return  # absent, or in use


def require_hierarchies() -> None:
    if not hierarchies():
        raise HarnessError(
            "this machine has cgroup version 2 only; the cluster needs version 1 hierarchies: "
            "run the tests against a cluster you have (CLUSTER=existing KUBECONFIG=...)"
        )
