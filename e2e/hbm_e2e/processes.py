"""Processes inside pods of our own cluster: killed as the kernel would, and what they have used."""

import json
from collections.abc import Mapping
from typing import Any

from hbm_e2e.cluster import Cluster
from hbm_e2e.errors import HarnessError
from hbm_e2e.objects import containers

_CTR = ("ctr", "--namespace", "k8s.io", "tasks")


def kill(cluster: Cluster, pod: Mapping[str, Any], container: str, command: str = "") -> None:
    """SIGKILL to a container's processes whose command line holds `command`; by default to its
    first process, which ends the container."""
    node = cluster.node(pod["spec"]["nodeName"])
    identity = _identity(pod, container)
    if not command:
        node.run(*_CTR, "kill", "--signal", "SIGKILL", identity)
        return
    pids = [line.split()[0] for line in node.run(*_CTR, "ps", identity).splitlines()[1:]]
    victims = [pid for pid in pids if command in _command_line(cluster, node.name, pid)]
    if not victims:
        raise HarnessError(f"{container} runs no process with {command!r} in its command line")
    node.run("kill", "-KILL", *victims)


def cpu_s(cluster: Cluster, pod: Mapping[str, Any], container: str) -> float:
    """CPU time that a container has had since it was last started."""
    node = cluster.node(pod["spec"]["nodeName"])
    said = node.run(*_CTR, "metrics", "--format", "json", _identity(pod, container))
    return float(json.loads(said)["cpu"]["usage"]["total"]) / 1e9


def _identity(pod: Mapping[str, Any], container: str) -> str:
    for one in containers(pod):
        if one["name"] == container:
            return str(one["containerID"]).removeprefix("containerd://")
    raise HarnessError(f"pod {pod['metadata']['name']} has no running container {container!r}")


def _command_line(cluster: Cluster, node: str, pid: str) -> str:
    words = cluster.node(node).run("cat", f"/proc/{pid}/cmdline")
    return words.replace("\0", " ")
