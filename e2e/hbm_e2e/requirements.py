"""What the machine must have before a cluster is started: checked first, said in one line."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hbm_e2e.cgroups import require_hierarchies
from hbm_e2e.errors import HarnessError
from hbm_e2e.kubectl import run
from hbm_e2e.places import cache_dir

# Program or file that is looked for, and the Debian package it comes from.
PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "ip": "iproute2",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "openssl": "openssl",
    "sysctl": "procps",
    "nsenter": "util-linux",
    "mount": "mount",
}
FREE_BYTES = 12 << 30
MEMORY_BYTES = 6 << 30


def require(say: Callable[[str], None] = print) -> None:
    """`probe`, and Debian packages that are missing are installed; else raises."""
    probe()
    missing = missing_packages()
    if missing:
        say(f"installing Debian packages: {' '.join(missing)}")
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        run(["apt-get", "update", "-q"], timeout_s=600, environ=quiet)
        run(
            ["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing],
            timeout_s=1200,
            environ=quiet,
        )


def probe() -> None:
    """Whether this machine could hold a cluster: root, namespaces, cgroups, Debian or its programs,
    disk, memory. Changes nothing; raises `HarnessError` with one line."""
    if os.geteuid() != 0:
        raise HarnessError(
            "a cluster of its own needs root (namespaces, cgroups, mounts): run as root, or "
            "against a cluster you have (CLUSTER=existing KUBECONFIG=...)"
        )
    require_hierarchies()
    try:
        run(["unshare", "--mount", "--pid", "--net", "--fork", "true"], timeout_s=20)
    except (HarnessError, OSError) as error:
        raise HarnessError(f"namespaces cannot be made here: {error}") from error
    missing = missing_packages()
    if missing and not (Path("/etc/debian_version").exists() and shutil.which("apt-get")):
        raise HarnessError(f"install these programs: {' '.join(missing)} (names of Debian)")
    _require_room()


def missing_packages() -> list[str]:
    """Debian packages whose programs are not found, each once."""
    path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
    absent = [name for name in PACKAGES if shutil.which(name, path=path) is None]
    return sorted({PACKAGES[name] for name in absent})


def _require_room() -> None:
    place = cache_dir()
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if free < FREE_BYTES:
        raise HarnessError(
            f"{place} has {free >> 30} GiB free, a cluster needs {FREE_BYTES >> 30}: "
            "free some, or set XDG_CACHE_HOME"
        )
    memory = machine_memory_bytes()
    if memory < MEMORY_BYTES:
        raise HarnessError(
            f"the machine has {memory >> 30} GiB of memory, a cluster needs {MEMORY_BYTES >> 30}"
        )


def machine_memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
