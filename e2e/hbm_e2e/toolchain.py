"""Every program of the cluster, built from a pinned Go module and kept outside the tree."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hbm_e2e.errors import HarnessError, ToolMissing
from hbm_e2e.places import TOOLS, cache_dir

KUBERNETES = "k8s.io/kubernetes"
MINIMUM_GO = (1, 21)
"""From here on the go command fetches the toolchain that a go.mod asks for."""


@dataclass(frozen=True)
class GoModule:
    """A folder below `e2e/tools` and what is built from it: program name to import path."""

    name: str
    programs: Mapping[str, str]
    stamp_version_of: str | None = None
    """Module whose version the programs report as the Kubernetes version."""

    @property
    def folder(self) -> Path:
        return TOOLS / self.name

    def digest(self) -> str:
        """Hash of everything the build depends on but the Go release."""
        state = hashlib.sha256(" ".join(self.flags()).encode())
        for file in sorted(self.folder.iterdir()):
            state.update(f"{file.name}\0".encode())
            state.update(file.read_bytes())
        return state.hexdigest()[:16]

    def flags(self) -> list[str]:
        link = "-s -w"
        if self.stamp_version_of:
            version = self.version_of(self.stamp_version_of)
            major, minor, _ = version.removeprefix("v").split(".", 2)
            stamp = "-X k8s.io/component-base/version."
            link += f" {stamp}gitVersion={version} {stamp}gitMajor={major} {stamp}gitMinor={minor}"
        return ["-trimpath", "-buildvcs=false", "-ldflags", link]

    def version_of(self, module: str) -> str:
        """The pinned version of a required module, such as `v1.35.4`."""
        found = re.search(
            rf"^\s*(?:require )?{re.escape(module)} (v\S+)",
            (self.folder / "go.mod").read_text(),
            re.MULTILINE,
        )
        if found is None:
            raise HarnessError(f"{self.folder / 'go.mod'} does not require {module}")
        return found.group(1)


# In the order of need: the API server alone serves most tests, and is ready first.
MODULES = (
    GoModule(
        "controlplane",
        {
            name: f"{KUBERNETES}/cmd/{name}"
            for name in (
                "kube-apiserver",
                "kube-controller-manager",
                "kubectl",
                "kube-scheduler",
                "kubelet",
                "kube-proxy",
            )
        },
        stamp_version_of=KUBERNETES,
    ),
    GoModule("etcd", {"etcd": "go.etcd.io/etcd/server/v3"}),
    GoModule("pause", {"pause": "."}),
    GoModule("coredns", {"coredns": "."}),
    GoModule("helm", {"helm": "helm.sh/helm/v4/cmd/helm"}),
)
PROGRAMS = tuple(name for module in MODULES for name in module.programs)


class Toolchain:
    """Programs by name. Two builds at a time on one machine do no harm: the second one waits."""

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = (cache or cache_dir()) / "bin"

    def path(self, program: str) -> Path:
        """The built program; `ToolMissing` if nobody has built it from the present pins."""
        path = self._place(program)
        if not path.exists():
            raise ToolMissing(
                f"{program} is not built: run `PYTHONPATH=e2e python3.11 -m hbm_e2e build`"
            )
        return path

    def missing(self, programs: Iterable[str] = PROGRAMS) -> list[str]:
        return [program for program in programs if not self._place(program).exists()]

    def kubernetes_version(self) -> str:
        return _module_of("kube-apiserver").version_of(KUBERNETES)

    def build(self, programs: Iterable[str] = PROGRAMS, say: Callable[[str], None] = print) -> None:
        """Build what is missing at low priority, two modules at a time; raises `HarnessError`."""
        wanted = list(programs)
        for program in wanted:
            _module_of(program)
        if not self.missing(wanted):
            return
        go = find_go()
        with ThreadPoolExecutor(max_workers=2) as pool:
            builds = [
                pool.submit(self._build_module, go, module, wanted, say) for module in MODULES
            ]
        for build in builds:
            build.result()

    def _build_module(
        self, go: str, module: GoModule, wanted: list[str], say: Callable[[str], None]
    ) -> None:
        for program, package in module.programs.items():
            target = self._place(program)
            if program not in wanted or target.exists():
                continue
            with _exclusive(target.with_suffix(".lock")):
                if target.exists():
                    continue
                started = time.monotonic()
                unfinished = target.with_suffix(".unfinished")
                result = subprocess.run(
                    ["nice", "-n", "10", go, "build", *module.flags(), "-o", unfinished, package],
                    cwd=module.folder,
                    env={**os.environ, "CGO_ENABLED": "0"},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if result.returncode:
                    tail = "\n".join(result.stderr.strip().splitlines()[-5:])
                    raise HarnessError(f"go build of {program} failed:\n{tail}")
                unfinished.rename(target)
                say(f"built {program} in {time.monotonic() - started:.0f} s")

    def _place(self, program: str) -> Path:
        module = _module_of(program)
        return self._cache / f"{module.name}-{module.digest()}" / program


def _module_of(program: str) -> GoModule:
    for module in MODULES:
        if program in module.programs:
            return module
    raise HarnessError(f"no such program: {program} (known: {', '.join(PROGRAMS)})")


def find_go() -> str:
    """Path of the go command; raises `HarnessError` where there is none that is new enough."""
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        raise HarnessError("needs Go 1.21 or newer to build the cluster's programs: install Go")
    version = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, check=True)
    found = re.match(r"go(\d+)\.(\d+)", version.stdout)
    if found is None or (int(found[1]), int(found[2])) < MINIMUM_GO:
        raise HarnessError(f"needs Go 1.21 or newer, {go} is {version.stdout.strip()}")
    return go


@contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
