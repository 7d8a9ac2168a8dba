"""Thin runners of kubectl and helm: they add the kubeconfig and turn failures into errors."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hbm_e2e.errors import HarnessError
from hbm_e2e.waiting import wait_for

Manifest = Mapping[str, Any]


class CommandFailed(HarnessError):
    """A command ended with a non-zero code; `output` is what it wrote to standard error."""

    def __init__(self, command: Sequence[str], code: int, output: str) -> None:
        super().__init__(f"{' '.join(command)} ended with {code}: {output.strip()}")
        self.code = code
        self.output = output


def run(
    command: Sequence[str],
    *,
    given: str | None = None,
    timeout_s: float = 120,
    environ: Mapping[str, str] | None = None,
) -> str:
    """Standard output of a command that must succeed; `given` is its standard input."""
    try:
        result = subprocess.run(
            command,
            input=given,
            stdin=subprocess.DEVNULL if given is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env=None if environ is None else {**os.environ, **environ},
        )
    except subprocess.TimeoutExpired as error:
        raise HarnessError(f"{' '.join(command)} took longer than {timeout_s:g} s") from error
    if result.returncode:
        raise CommandFailed(command, result.returncode, result.stderr or result.stdout)
    return result.stdout


class Kubectl:
    """kubectl with one kubeconfig; words are passed as they are."""

    def __init__(self, program: Path | str, kubeconfig: Path, namespace: str | None = None) -> None:
        self.program = program
        self.kubeconfig = kubeconfig
        self.namespace = namespace

    def within(self, namespace: str) -> "Kubectl":
        """The same runner with another default namespace."""
        return Kubectl(self.program, self.kubeconfig, namespace)

    def command(self, *words: str) -> list[str]:
        """The full command line, for callers that run it themselves (logs -f, port-forward)."""
        namespace = ["--namespace", self.namespace] if self.namespace else []
        return [str(self.program), "--kubeconfig", str(self.kubeconfig), *namespace, *words]

    def __call__(self, *words: str, given: str | None = None, timeout_s: float = 120) -> str:
        return run(self.command(*words), given=given, timeout_s=timeout_s)

    def apply(self, *manifests: Manifest, server_side: bool = False) -> None:
        """Apply objects given as dicts; server side with force where asked for."""
        listing = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)})
        flags = ["--server-side", "--force-conflicts"] if server_side else []
        self("apply", *flags, "-f", "-", given=listing)

    def get(self, *words: str) -> Any:
        """`kubectl get … -o json`, parsed."""
        return json.loads(self("get", *words, "-o", "json"))

    def items(self, *words: str) -> list[Any]:
        """The objects of a list, `items("pods", "-l", "app=web")`."""
        return list(self.get(*words)["items"])

    def exec(
        self, pod: str, *command: str, container: str | None = None, given: str | None = None
    ) -> str:
        flags = ["-c", container] if container else []
        stdin = [] if given is None else ["-i"]
        return self("exec", *stdin, pod, *flags, "--", *command, given=given)

    def wait_ready(self, workload: str, timeout_s: float = 120) -> None:
        """Until a rollout such as `deployment/web` is complete."""
        self("rollout", "status", workload, f"--timeout={timeout_s:g}s", timeout_s=timeout_s + 10)

    def wait_for_service_account(self, name: str = "default") -> None:
        """Until the namespace has its service account: pods are refused before."""
        wait_for(
            lambda: self("get", "serviceaccount", name, "--ignore-not-found"),
            60,
            f"service account {name} in {self.namespace}",
        )

    def wait_gone(self, *words: str, timeout_s: float = 60) -> None:
        """Until `kubectl get WORDS` lists nothing."""
        wait_for(
            lambda: not self("get", *words, "--ignore-not-found", "-o", "name").strip(),
            timeout_s,
            f"{' '.join(words)} to be gone",
        )

    def ready(self) -> bool:
        """Whether the API server answers `/readyz`."""
        try:
            return self("get", "--raw", "/readyz", "--request-timeout=5s").strip() == "ok"
        except HarnessError:
            return False


class Helm:
    """helm with one kubeconfig and a home of its own."""

    def __init__(self, program: Path | str, kubeconfig: Path, home: Path) -> None:
        self.program = program
        self.environ = {
            "KUBECONFIG": str(kubeconfig),
            "HELM_CACHE_HOME": str(home / "cache"),
            "HELM_CONFIG_HOME": str(home / "config"),
            "HELM_DATA_HOME": str(home / "data"),
        }

    def __call__(self, *words: str, timeout_s: float = 300) -> str:
        return run([str(self.program), *words], timeout_s=timeout_s, environ=self.environ)
