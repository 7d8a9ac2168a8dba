"""Finding the server and the credentials, and following them as they change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hbm_e2e.api_server import ApiServer
from hbm_kube.client import KubeClient
from hbm_kube.config import KubeConfig
from hbm_kube.credentials import READ_AGAIN_S, Credentials
from hbm_kube.errors import KubeConfigError, NotFound, Unauthorized, Unavailable
from hbm_kube.resources import PODS

from tests.kube_faults import FaultProxy

IN_A_POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}


def kubeconfig(path: Path, user: dict[str, Any], cluster: dict[str, Any] | None = None) -> Path:
    file = path / "config"
    file.write_text(
        yaml.safe_dump(
            {
                "current-context": "here",
                "contexts": [
                    {"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "n"}}
                ],
                "clusters": [
                    {"name": "c", "cluster": {"server": "https://a:6443/", **(cluster or {})}}
                ],
                "users": [{"name": "u", "user": user}],
            }
        )
    )
    return file


def test_in_a_pod(tmp_path: Path) -> None:
    (tmp_path / "namespace").write_text("team-a\n")
    config = KubeConfig.in_cluster(tmp_path, IN_A_POD)
    assert config.server == "https://10.96.0.1:443"
    assert config.namespace == "team-a"
    six = KubeConfig.in_cluster(tmp_path, {**IN_A_POD, "KUBERNETES_SERVICE_HOST": "fd00::1"})
    assert six.server == "https://[fd00::1]:443"


def test_outside_of_a_pod(tmp_path: Path) -> None:
    with pytest.raises(KubeConfigError, match="KUBERNETES_SERVICE_HOST is not set"):
        KubeConfig.in_cluster(tmp_path, {})


def test_kubeconfig_with_a_token_and_files_beside_it(tmp_path: Path) -> None:
    config = KubeConfig.from_kubeconfig(
        kubeconfig(tmp_path, {"tokenFile": "token"}, {"certificate-authority": "ca.crt"})
    )
    assert config.server == "https://a:6443"
    assert config.namespace == "n"
    assert config.token_file == tmp_path / "token"
    assert config.ca_file == tmp_path / "ca.crt"


@pytest.mark.parametrize(
    ("user", "cluster", "complaint"),
    [
        ({"exec": {"command": "aws"}}, {}, "credential plug-in"),
        ({"client-certificate-data": "%%"}, {}, "client-certificate-data is not base64"),
        ({"client-certificate": "nowhere.pem"}, {}, "client-certificate: .*nowhere.pem"),
        ({}, {"server": "ftp://a"}, "is no https:// address"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used(
    tmp_path: Path, user: dict[str, Any], cluster: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(KubeConfigError, match=complaint):
        KubeConfig.from_kubeconfig(kubeconfig(tmp_path, user, cluster))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("- 1", "is no kubeconfig"), ("{", "is no YAML"), ("a: 1", "has no context None")],
)
def test_a_file_that_is_no_kubeconfig(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "config"
    file.write_text(content)
    with pytest.raises(KubeConfigError, match=complaint):
        KubeConfig.from_kubeconfig(file)
    with pytest.raises(KubeConfigError, match="cannot be read"):
        KubeConfig.from_kubeconfig(tmp_path / "absent")


def test_credentials_are_no_part_of_what_is_printed() -> None:
    config = KubeConfig("https://a", token="secret", client_key=b"secret")
    assert "secret" not in f"{config} {config!r}"


def test_a_token_is_read_again(tmp_path: Path) -> None:
    now = [0.0]
    token = tmp_path / "token"
    credentials = Credentials(KubeConfig("https://a", token_file=token), lambda: now[0])
    with pytest.raises(Unavailable, match="no token"):
        credentials.headers()
    token.write_text("one\n")
    assert credentials.headers() == {"Authorization": "Bearer one"}
    token.write_text("two")
    assert credentials.headers() == {"Authorization": "Bearer one"}
    now[0] += READ_AGAIN_S
    assert credentials.headers() == {"Authorization": "Bearer two"}
    token.unlink()
    now[0] += READ_AGAIN_S
    assert credentials.headers() == {"Authorization": "Bearer two"}
    assert not credentials.refused()
    token.write_text("three")
    assert credentials.refused()
    assert credentials.headers() == {"Authorization": "Bearer three"}


def test_a_ca_is_read_again(tmp_path: Path) -> None:
    def authority(name: str) -> bytes:
        pair = tmp_path / f"{name}.key", tmp_path / f"{name}.crt"
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"),
                *("-pkeyopt", "ec_paramgen_curve:P-256", "-subj", f"/CN={name}"),
                *("-keyout", str(pair[0]), "-out", str(pair[1])),
            ],
            check=True,
            capture_output=True,
        )
        return pair[1].read_bytes()

    def names(context: Any) -> list[str]:
        return [ca["subject"][0][0][1] for ca in context.get_ca_certs()]

    now = [0.0]
    ca = tmp_path / "ca.crt"
    credentials = Credentials(KubeConfig("https://a", ca_file=ca), lambda: now[0])
    with pytest.raises(Unavailable, match="no CA"):
        credentials.tls()
    ca.write_bytes(authority("one"))
    first = credentials.tls()
    assert names(first) == ["one"]
    now[0] += READ_AGAIN_S
    assert credentials.tls() is first
    ca.write_bytes(authority("two"))
    now[0] += READ_AGAIN_S
    assert names(credentials.tls()) == ["two"]
    ca.write_bytes(b"half a certif")
    now[0] += READ_AGAIN_S
    assert names(credentials.tls()) == ["two"]


@pytest.mark.apiserver
async def test_the_administrator_by_certificate(api_server: ApiServer) -> None:
    config = KubeConfig.from_kubeconfig(api_server.kubeconfig)
    async with KubeClient(config) as kube:
        with pytest.raises(NotFound):
            await kube.get(PODS, "nobody", "default")


@pytest.mark.apiserver
async def test_a_token_that_is_no_longer_known_is_replaced_within_the_request(
    api_server: ApiServer, namespace: str, tmp_path: Path
) -> None:
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "view", "namespace": namespace},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"},
        "subjects": [{"kind": "ServiceAccount", "name": "default", "namespace": namespace}],
    }
    api_server.kubectl.apply(binding)
    kubectl = api_server.kubectl.within(namespace)
    kubectl("create", "secret", "generic", "anchor")
    secret = kubectl.get("secret", "anchor")
    # A token that ends with an object, as one of a pod ends with the pod.
    bound = kubectl(
        "create", "token", "default", "--bound-object-kind=Secret",
        "--bound-object-name=anchor", f"--bound-object-uid={secret['metadata']['uid']}",
    ).strip()  # fmt: skip
    with FaultProxy(api_server) as proxy:
        folder = proxy.token_dir(tmp_path / "token", bound, namespace)
        async with KubeClient(KubeConfig.in_cluster(folder, proxy.environment())) as kube:
            await kube.list(PODS, namespace)
            kubectl("delete", "secret", "anchor")
            proxy.answer(401)  # the server itself keeps a good answer for some seconds
            with pytest.raises(Unauthorized):
                await kube.list(PODS, namespace)
            (folder / "token").write_text(api_server.token("default", namespace))
            proxy.answer(401)
            await kube.list(PODS, namespace)
        used = [seen.authorization for seen in proxy.seen]
        assert used[-2] == f"Bearer {bound}"
        assert used[-1] not in used[:-1]


def test_it_is_small_to_import() -> None:
    """What a sidecar of 400 MB pays for it: aiohttp, and nothing of the large clients."""
    code = (
        "import sys, hbm_kube.client, hbm_kube.watch, hbm_kube.config\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "aiohttp" in loaded
    heavy = {"kubernetes", "kopf", "numpy", "pydantic", "yaml", "tornado", "cryptography"}
    assert not heavy & set(loaded)
