"""Where the API server is and who we are: from a pod's files, or from a kubeconfig."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from hbm_kube.errors import KubeConfigError

TOKEN_DIR: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True)
class KubeConfig:
    """One API server and one identity. Files are read when they are needed, and again later."""

    server: str
    """https://HOST:PORT, without a path at its end."""
    namespace: str = "default"
    ca_file: Path | None = None
    ca_data: bytes | None = None
    """PEM. Without either the certificates of the system count."""
    token_file: Path | None = None
    token: str | None = None
    client_cert: bytes | None = None
    """PEM; together with `client_key`."""
    client_key: bytes | None = None
    tls_server_name: str | None = None
    """Name in the server's certificate, where it is not that of `server`."""
    verify: bool = True

    def __repr__(self) -> str:
        """Server and namespace; credentials stay out of logs."""
        return f"KubeConfig(server={self.server!r}, namespace={self.namespace!r})"

    @classmethod
    def in_cluster(
        cls, token_dir: Path = TOKEN_DIR, environ: Mapping[str, str] = os.environ
    ) -> Self:
        """As a pod finds it: address in the environment, `token`, `ca.crt` (and `namespace`) in
        `token_dir`.

        Raises `KubeConfigError` outside of a pod. The files need not be there yet.
        """
        host = environ.get("KUBERNETES_SERVICE_HOST", "")
        port = environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise KubeConfigError(
                "KUBERNETES_SERVICE_HOST is not set: this is no pod of a cluster; "
                "name a kubeconfig instead"
            )
        try:
            namespace = (token_dir / "namespace").read_text().strip()
        except OSError:
            namespace = ""
        return cls(
            server=f"https://{f'[{host}]' if ':' in host else host}:{port}",
            namespace=namespace or "default",
            ca_file=token_dir / "ca.crt",
            token_file=token_dir / "token",
        )

    @classmethod
    def from_kubeconfig(cls, path: Path, context: str | None = None) -> Self:
        """One context (the current one) of a kubeconfig file.

        Raises `KubeConfigError` where a part is missing, or asks for a credential plug-in.
        """
        content = _load(path)
        wanted = context or content.get("current-context")
        chosen = _named(content, "context", wanted, path)
        cluster = _named(content, "cluster", chosen.get("cluster"), path)
        user = _named(content, "user", chosen.get("user"), path)
        server = str(cluster.get("server") or "").rstrip("/")
        if not server.startswith(("https://", "http://")):
            raise KubeConfigError(f"{path}: server {server!r} is no https:// address")
        if "exec" in user or "auth-provider" in user:
            raise KubeConfigError(
                f"{path}: user {chosen.get('user')!r} needs a credential plug-in, which is not "
                "supported; use a token or a client certificate"
            )
        token_file = user.get("tokenFile")
        ca_file = cluster.get("certificate-authority")
        return cls(
            server=server,
            namespace=str(chosen.get("namespace") or "default"),
            ca_file=path.parent / ca_file if ca_file else None,
            ca_data=_data(cluster, "certificate-authority", path, files=False),
            token_file=path.parent / token_file if token_file else None,
            token=user.get("token"),
            client_cert=_data(user, "client-certificate", path),
            client_key=_data(user, "client-key", path),
            tls_server_name=cluster.get("tls-server-name"),
            verify=not cluster.get("insecure-skip-tls-verify", False),
        )


def _load(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise KubeConfigError(f"{path} cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise KubeConfigError(f"{path} is no YAML ({error})") from error
    if not isinstance(content, dict):
        raise KubeConfigError(f"{path} is no kubeconfig")
    return content


def _named(content: dict[str, Any], kind: str, name: Any, path: Path) -> dict[str, Any]:
    for entry in content.get(f"{kind}s") or ():
        if isinstance(entry, dict) and entry.get("name") == name:
            found = entry.get(kind)
            return found if isinstance(found, dict) else {}
    raise KubeConfigError(f"{path} has no {kind} {name!r}")


def _data(part: dict[str, Any], key: str, path: Path, files: bool = True) -> bytes | None:
    """`KEY-data`, or with `files` the content of the file that KEY names."""
    if part.get(f"{key}-data"):
        try:
            return base64.b64decode(part[f"{key}-data"], validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise KubeConfigError(f"{path}: {key}-data is not base64 ({error})") from error
    if files and part.get(key):
        try:
            return path.parent.joinpath(part[key]).read_bytes()
        except OSError as error:
            raise KubeConfigError(f"{path}: {key}: {error}") from error
    return None
