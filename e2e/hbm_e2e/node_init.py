"""First process of a node: private standard paths, then it only reaps.

Run as `python node_init.py FOLDER` inside fresh mount and pid namespaces. Every program of the
node then finds its default paths (the device-plugin socket's cannot be changed) and sees nobody
else's. Killing this process is the power-off: the kernel ends everything in the pid namespace.
"""

import signal
import subprocess
import sys
from pathlib import Path

PRIVATE = {
    "containerd": "/var/lib/containerd",
    "kubelet": "/var/lib/kubelet",
    "cni": "/var/lib/cni",
    "cni-config": "/etc/cni/net.d",
    "pod-logs": "/var/log/pods",
    "container-logs": "/var/log/containers",
}


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def main() -> None:
    folder = Path(sys.argv[1])
    mount("--make-rprivate", "/")
    mount("--make-rshared", "/")  # pods may ask for mounts that propagate
    for name, path in PRIVATE.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        Path(path).mkdir(parents=True, exist_ok=True)
        mount("--bind", str(folder / name), path)
    mount("-t", "tmpfs", "tmpfs", "/run")
    for name in ("containerd", "netns", "lock"):
        Path("/run", name).mkdir()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps orphans
    (folder / "powered").touch()
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
