"""A real API server without nodes: for the operator's tests and the scale benchmark."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from hbm_e2e.control_plane import ControlPlane, Endpoints, Flags
from hbm_e2e.daemon import Daemon
from hbm_e2e.errors import HarnessError
from hbm_e2e.kubectl import Kubectl
from hbm_e2e.ports import free_ports
from hbm_e2e.toolchain import Toolchain

PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")

# Without nodes nothing may evict or sweep the pods that a test places on imaginary ones.
CONTROLLERS = ",".join(
    (
        "*",
        "-pod-garbage-collector-controller",
        "-node-lifecycle-controller",
        "-taint-eviction-controller",
    )
)


class ApiServer:
    """etcd, kube-apiserver and the controllers (garbage collection, service accounts, workloads)
    on free loopback ports, as an ordinary user, with all state in `folder`.

    No scheduler and no kubelet: pods stay Pending, and a pod that names a node goes only by
    `--grace-period=0 --force`. Use as a context manager from the main thread: the processes die
    with the thread that started them, so that a killed test leaves nothing behind.
    """

    def __init__(
        self,
        folder: Path,
        toolchain: Toolchain | None = None,
        *,
        api_server_flags: Sequence[str] = (),
        controllers: bool = True,
    ) -> None:
        self.folder = folder
        self._toolchain = toolchain or Toolchain()
        self._with_controllers = controllers
        # Nobody would make service accounts, so pods must not be made to wait for one.
        alone = () if controllers else ("--disable-admission-plugins=ServiceAccount",)
        self._flags = Flags(
            api_server=("--endpoint-reconciler-type=none", *alone, *api_server_flags),
            controller_manager=(f"--controllers={CONTROLLERS}", "--secure-port=0"),
        )
        self._control_plane: ControlPlane | None = None

    def start(self) -> "ApiServer":
        """Up and ready in a few seconds; `ToolMissing` when the programs are not built."""
        for attempt in range(3):
            plane = self._plane_on_free_ports()
            self._control_plane = plane
            try:
                plane.start(plane.etcd, plane.api_server)
                plane.wait_ready()
            except HarnessError:
                self.stop()
                taken = any(
                    daemon.log.exists() and "address already in use" in daemon.log.read_text()
                    for daemon in self._daemons(plane)
                )
                if not taken or attempt == 2:
                    raise
                shutil.rmtree(self.folder)  # another program took a port in between
                continue
            break
        if self._with_controllers:
            plane.start(plane.controller_manager)
            self.kubectl.within("default").wait_for_service_account()
        return self

    def stop(self) -> None:
        """End the processes; the folder stays."""
        if self._control_plane is not None:
            # Nothing is kept, so nothing has to be written down: no graceful end, no waiting.
            for daemon in self._daemons(self._control_plane):
                daemon.kill()
            self._control_plane = None

    def __enter__(self) -> "ApiServer":
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def control_plane(self) -> ControlPlane:
        if self._control_plane is None:
            raise HarnessError("the API server is not started")
        return self._control_plane

    @property
    def url(self) -> str:
        return self.control_plane.endpoints.url

    @property
    def kubeconfig(self) -> Path:
        """Cluster administrator, certificates inlined."""
        return self.control_plane.kubeconfig

    @property
    def ca_certificate(self) -> Path:
        return self.control_plane.pki.ca.certificate

    @property
    def kubectl(self) -> Kubectl:
        return self.control_plane.kubectl

    def token(
        self, service_account: str, namespace: str = "default", pod: tuple[str, str] | None = None
    ) -> str:
        """A token of a service account, bound to a pod (name, uid) where one is given."""
        bound = []
        if pod is not None:
            name, uid = pod
            bound = [
                "--bound-object-kind=Pod",
                f"--bound-object-name={name}",
                f"--bound-object-uid={uid}",
            ]
        kubectl = self.kubectl.within(namespace)
        return kubectl("create", "token", service_account, *bound).strip()

    def kill_api(self) -> None:
        """Outage: SIGKILL of kube-apiserver; etcd keeps the data."""
        self.control_plane.api_server.kill()

    def restore_api(self) -> None:
        """End of the outage, on the same port."""
        self.control_plane.start(self.control_plane.api_server)
        self.control_plane.wait_ready()

    def _daemons(self, plane: ControlPlane) -> list[Daemon]:
        always = [plane.api_server, plane.etcd]
        return [plane.controller_manager, *always] if self._with_controllers else always

    def _plane_on_free_ports(self) -> ControlPlane:
        return ControlPlane(
            self.folder,
            self._toolchain,
            Endpoints("127.0.0.1", *free_ports(3)),
            enter=("setpriv", "--pdeathsig", "KILL"),
            flags=self._flags,
        )
