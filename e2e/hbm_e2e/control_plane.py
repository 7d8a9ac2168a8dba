"""etcd, kube-apiserver, kube-controller-manager and kube-scheduler as plain processes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from hbm_e2e.daemon import Daemon
from hbm_e2e.errors import HarnessError
from hbm_e2e.kubectl import Kubectl
from hbm_e2e.pki import Pki
from hbm_e2e.toolchain import Toolchain
from hbm_e2e.waiting import wait_for

SERVICE_RANGE = "10.96.0.0/16"
SERVICE_NAMES = [
    f"DNS:{name}"
    for name in (
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    )
]


@dataclass(frozen=True)
class Endpoints:
    """Where the parts listen; etcd is reached over loopback only."""

    address: str
    port: int = 6443
    etcd_port: int = 2379
    etcd_peer_port: int = 2380

    @property
    def url(self) -> str:
        return f"https://{self.address}:{self.port}"

    @property
    def etcd_url(self) -> str:
        return f"http://127.0.0.1:{self.etcd_port}"


@dataclass(frozen=True)
class Flags:
    """What one use of the control plane adds to the flags that all uses have."""

    api_server: Sequence[str] = ()
    controller_manager: Sequence[str] = ()
    scheduler: Sequence[str] = field(default=())


class ControlPlane:
    """The four processes; each can be killed and started again on its own, and one may use fewer.

    `enter` goes before every command (a network namespace, say). `public_url` is where kubectl on
    this machine finds the API server, if not at the address it listens on.
    """

    def __init__(
        self,
        folder: Path,
        toolchain: Toolchain,
        endpoints: Endpoints,
        *,
        enter: Sequence[str] = (),
        public_url: str | None = None,
        flags: Flags | None = None,
    ) -> None:
        self.folder = folder
        self.endpoints = endpoints
        self.pki = Pki(folder / "pki")
        self._enter = enter
        self._toolchain = toolchain
        self._flags = flags or Flags()
        admin = self.pki.issue("admin", "/O=system:masters/CN=admin")
        self.kubeconfig = self.pki.kubeconfig(
            folder / "admin.kubeconfig", public_url or endpoints.url, admin
        )
        self.kubectl = Kubectl(toolchain.path("kubectl"), self.kubeconfig)

    @cached_property
    def etcd(self) -> Daemon:
        return Daemon("etcd", self._etcd_command(), self.folder)

    @cached_property
    def api_server(self) -> Daemon:
        return Daemon("kube-apiserver", self._api_server_command(), self.folder)

    @cached_property
    def controller_manager(self) -> Daemon:
        command = self._controller_manager_command()
        return Daemon("kube-controller-manager", command, self.folder)

    @cached_property
    def scheduler(self) -> Daemon:
        return Daemon("kube-scheduler", self._scheduler_command(), self.folder)

    @property
    def daemons(self) -> tuple[Daemon, ...]:
        return self.etcd, self.api_server, self.controller_manager, self.scheduler

    def start(self, *daemons: Daemon) -> None:
        """Start the given parts in this order (each unless running)."""
        for daemon in daemons:
            daemon.start(enter=self._enter)

    def wait_ready(self, timeout_s: float = 60) -> None:
        """Until the API server answers; says at once when it or etcd has died."""

        def ready() -> bool:
            for daemon in (self.etcd, self.api_server):
                if not daemon.alive:
                    raise HarnessError(f"{daemon.name} died: {daemon.last_words()}")
            return self.kubectl.ready()

        wait_for(ready, timeout_s, "the API server", because=self.api_server.last_words)

    def component_kubeconfig(self, name: str, subject: str) -> Path:
        """A kubeconfig for a component that reaches the API server at its own address."""
        user = self.pki.issue(name, subject)
        return self.pki.kubeconfig(self.folder / f"{name}.kubeconfig", self.endpoints.url, user)

    def _etcd_command(self) -> list[str | Path]:
        peer = f"http://127.0.0.1:{self.endpoints.etcd_peer_port}"
        return [
            self._toolchain.path("etcd"),
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={self.endpoints.etcd_url}",
            f"--advertise-client-urls={self.endpoints.etcd_url}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",  # the machine's power is not what is tested
            "--log-level=warn",
        ]

    def _api_server_command(self) -> list[str | Path]:
        pki = self.pki
        address = self.endpoints.address
        server = pki.issue(
            "kube-apiserver",
            "/CN=kube-apiserver",
            [*SERVICE_NAMES, "IP:127.0.0.1", "IP:10.96.0.1", f"IP:{address}"],
        )
        kubelet_client = pki.issue(
            "kube-apiserver-kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client"
        )
        front_proxy = pki.issue(
            "front-proxy-client", "/CN=front-proxy-client", authority=pki.front_proxy_ca
        )
        signer = pki.service_account_key()
        return [
            self._toolchain.path("kube-apiserver"),
            f"--etcd-servers={self.endpoints.etcd_url}",
            f"--bind-address={'127.0.0.1' if address == '127.0.0.1' else '0.0.0.0'}",
            f"--secure-port={self.endpoints.port}",
            f"--advertise-address={address}",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            f"--tls-cert-file={server.certificate}",
            f"--tls-private-key-file={server.key}",
            f"--client-ca-file={pki.ca.certificate}",
            f"--service-account-key-file={signer.with_suffix('.pub')}",
            f"--service-account-signing-key-file={signer}",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            f"--kubelet-certificate-authority={pki.ca.certificate}",
            f"--kubelet-client-certificate={kubelet_client.certificate}",
            f"--kubelet-client-key={kubelet_client.key}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--requestheader-client-ca-file={pki.front_proxy_ca.certificate}",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={front_proxy.certificate}",
            f"--proxy-client-key-file={front_proxy.key}",
            "--allow-privileged=true",
            # Webhooks are dialled at their pods: no kube-proxy is needed beside the API server.
            "--enable-aggregator-routing=true",
            # SIGTERM takes 3 s instead of 62 s.
            "--shutdown-send-retry-after=true",
            "--shutdown-watch-termination-grace-period=1s",
            *self._flags.api_server,
        ]

    def _controller_manager_command(self) -> list[str | Path]:
        own = self.component_kubeconfig(
            "kube-controller-manager", "/CN=system:kube-controller-manager"
        )
        ca = self.pki.ca
        return [
            self._toolchain.path("kube-controller-manager"),
            *_identity(own),
            f"--service-account-private-key-file={self.pki.service_account_key()}",
            f"--root-ca-file={ca.certificate}",
            f"--cluster-signing-cert-file={ca.certificate}",
            f"--cluster-signing-key-file={ca.key}",
            "--use-service-account-credentials=true",
            *self._flags.controller_manager,
        ]

    def _scheduler_command(self) -> list[str | Path]:
        own = self.component_kubeconfig("kube-scheduler", "/CN=system:kube-scheduler")
        return [self._toolchain.path("kube-scheduler"), *_identity(own), *self._flags.scheduler]


def _identity(kubeconfig: Path) -> list[str]:
    return [
        f"--kubeconfig={kubeconfig}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        "--leader-elect=false",
    ]
