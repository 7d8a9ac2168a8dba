"""A real sidecar beside a real API server: follows its HBMPartition, reports to its status.

Between the two stands a proxy that misbehaves. One sidecar serves all tests of its own partition;
each asks for another α and waits until that is what the model server has.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hbm_e2e.api_server import ApiServer
from hbm_kube.client import KubeClient
from hbm_kube.errors import Forbidden, NotFound
from hbm_kube.resources import HBM_PARTITIONS
from hbm_operator import names
from hbm_operator.models.crd import definitions
from hbm_operator.models.partition import HBMPartition
from hbm_pool.contracts import digest as codec

from tests.hbm_sidecar.cluster_pod import CONTENT, POD, Running, World, pod
from tests.hbm_sidecar.conftest import ModelServer, Redis, Sidecar, wait_until
from tests.kube_faults import FaultProxy

pytestmark = pytest.mark.apiserver


@pytest.fixture(scope="module")
def crds(api_server: ApiServer) -> ApiServer:
    """The API server with the custom resources served."""
    api_server.kubectl.apply(*definitions().values(), server_side=True)
    for each in definitions().values():
        crd = f"crd/{each['metadata']['name']}"
        api_server.kubectl("wait", "--for=condition=Established", crd)
    return api_server


@pytest.fixture(scope="module")
def running(crds: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "run").mkdir()
    with FaultProxy(crds) as proxy:
        world = Running(crds, proxy, folder)
        os.environ.update(proxy.environment())
        world.sidecar = Sidecar(folder / "run", folder / "sidecar.log", *world.flags())
        world.model_server = ModelServer(folder / "run")
        world.model_server.tell(traffic=1)
        yield world
        world.model_server.kill()
        assert world.sidecar.stop() == 0
        for name in proxy.environment():
            del os.environ[name]
        world.close()


@pytest.fixture
def world(running: Running) -> Running:
    """Without faults, and with its partition followed."""
    running.proxy.clear()
    running.until_applied(running.fixed(0.5))
    return running


def test_a_generation_is_followed_and_said(world: Running) -> None:
    before = world.applied()
    followed = world.sidecar.metric("hbm_sidecar_kube_followed_seconds_count")
    generation = world.fixed(0.3)
    world.until_alpha(0.3)
    condition = world.until_applied(generation)
    assert condition["reason"] == "Applied"
    assert condition["lastTransitionTime"] == before["lastTransitionTime"]
    status = world.status()
    assert status["observedGeneration"] == generation
    assert status["sidecar"]["protocol"] == names.PROTOCOL_VERSION
    assert status["lastReportTime"] >= before["lastTransitionTime"]
    told = HBMPartition.model_validate(world.kubectl.get("hbmp", POD)).status
    assert told.target is not None
    assert told.target < 0.5  # on its way: α moves at a limited speed
    metric = world.sidecar.metric
    wait_until(
        lambda: metric("hbm_sidecar_kube_followed_seconds_count") == followed + 1, "one more"
    )
    assert metric("hbm_sidecar_kube_generation") == generation
    assert metric("hbm_sidecar_kube_applied") == metric("hbm_sidecar_kube_up") == 1


def test_put_names_the_object(world: Running) -> None:
    answer = world.sidecar.control("PUT", "/v1/partition", json={"mode": "hold"})
    assert answer.status_code == 409
    assert f"HBMPartition {world.namespace}/{POD}" in answer.json()["detail"]
    assert world.sidecar.control("GET", "/v1/partition").json()["partition"]["alpha_fixed"] == 0.5


def test_measured_values_come_with_the_next_report(world: Running) -> None:
    world.until_applied(world.fixed(0.4))
    world.until_alpha(0.4)  # before Hold keeps it wherever the ramp has come to

    def told() -> dict[str, Any]:
        world.until_applied(world.ask(mode="Hold"))
        status = world.status()
        return status if "kvHitRatio" in status and "lastDecision" in status else {}

    status = wait_until(told, "measured values")
    assert 0.0 <= status["kvHitRatio"] <= 1.0
    assert 0.7 < status["embHitRatio"] < 0.8
    assert status["p99Ms"] == 9.0
    assert status["alpha"] == pytest.approx(0.4, abs=0.01)
    assert status["lastDecision"]["reasons"]


def test_moves_and_bounds_reach_the_decision(world: Running) -> None:
    moves = {"slewPerSecond": 2.0, "fraction": 1.0, "minChange": 0.005, "dwellSeconds": 0}
    world.until_applied(world.fixed(0.8, moves=moves, refill={"maxBytesPerSecond": "1Mi"}))
    policy = world.sidecar.state()["policy"]
    assert (policy["slew_per_s"], policy["move_fraction"]) == (2.0, 1.0)
    assert (policy["min_change"], policy["dwell_ms"]) == (0.005, 0.0)
    began = world.model_server.tell()["command_generation"]
    world.until_alpha(0.8)
    # At 2 per second .3 are a tick or two, at .05 per second they would be two dozen.
    assert world.model_server.tell()["command_generation"] - began < 12
    generation = world.ask(mode="Auto", alpha={"min": 0.1, "max": 0.25}, moves=moves)
    world.until_applied(generation)
    wait_until(lambda: world.alpha() <= 0.25, "α within its bounds")


def test_conditions_of_others_stay(world: Running) -> None:
    admitted = {
        **{"type": "Admitted", "status": "True", "reason": "PolicySelected", "message": ""},
        **{"lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1},
    }
    patch = [{"op": "add", "path": "/status/conditions/-", "value": admitted}]
    world.kubectl(
        *("patch", "hbmp", POD, "--subresource=status", "--type=json", "-p", json.dumps(patch)),
        *(f"--as={world.controller}", "--as-group=system:masters"),
    )
    world.until_applied(world.fixed(0.6))
    fields = world.kubectl("get", "hbmp", POD, "-o", "yaml", "--show-managed-fields")
    owners = {
        each["manager"]: each["fieldsV1"]
        for each in yaml.safe_load(fields)["metadata"]["managedFields"]
        if each.get("subresource") == "status"
    }
    mine = owners[names.SIDECAR_MANAGER]["f:status"]
    assert set(mine["f:conditions"]) == {'k:{"type":"Applied"}'}
    assert admitted in world.status()["conditions"]


@pytest.mark.parametrize(
    "fault",
    [
        {"code": 409, "method": "PATCH"},
        {"code": 429, "method": "PATCH", "retry_after_s": 1},
        {"code": 500, "method": "PATCH"},
        {"code": 403, "method": "PATCH"},
        {"code": 410, "method": "WATCH"},
        {"code": 404, "method": "GET"},
    ],
    ids=lambda fault: f"{fault['method']}-{fault['code']}",
)
def test_a_refusal_passes(world: Running, fault: dict[str, Any]) -> None:
    fault = {"times": 3, **fault}
    world.proxy.answer(fault.pop("code"), path="hbmpartitions", **fault)
    world.proxy.cut()
    generation = world.fixed(0.7)
    world.until_alpha(0.7)
    world.until_applied(generation)


@pytest.mark.parametrize("after", [False, True])
def test_a_lost_write_is_written_again(world: Running, after: bool) -> None:
    world.proxy.drop(method="PATCH", path="/status", times=3, after=after)
    world.until_applied(world.fixed(0.7))


def test_a_token_that_was_replaced_is_used(world: Running) -> None:
    fresh = world.server.token("default", world.namespace, pod=(POD, world.pod_uid))
    (world.token_dir / "token").write_text(fresh)
    world.proxy.answer(401, path="hbmpartitions", method="PATCH")
    world.until_applied(world.fixed(0.35))
    used = [seen.authorization for seen in world.proxy.seen if seen.method == "PATCH"]
    assert used[-1] == f"Bearer {fresh}"


def test_an_outage_of_the_api_changes_no_decision(world: Running) -> None:
    world.until_alpha(0.5)
    world.server.kill_api()
    try:
        wait_until(lambda: world.sidecar.metric("hbm_sidecar_kube_up") == 0, "the loss to be seen")
        before = world.sidecar.metric("hbm_sidecar_decisions_total")
        wait_until(
            lambda: world.sidecar.metric("hbm_sidecar_decisions_total") > before + 4, "decisions"
        )
        # Not even a restart of admin, which knows the API only from before.
        os.kill(world.sidecar.pid("admin"), 9)
        wait_until(
            lambda: world.sidecar.metric("hbm_sidecar_decisions_total") > 4, "decisions again"
        )
        answer = world.sidecar.control("GET", "/v1/partition").json()
        assert answer["partition"]["alpha_fixed"] == 0.5
        assert world.alpha() == pytest.approx(0.5, abs=0.003)
        assert world.sidecar.public("/healthz").status_code == 200
        log = world.sidecar.log.read_text
        wait_until(lambda: "watching the partition fails" in log(), "a word about it")
        assert "Traceback" not in log()
    finally:
        world.server.restore_api()
    world.until_applied(world.fixed(0.45))
    world.until_alpha(0.45)


def test_without_rights_decisions_go_on(world: Running) -> None:
    """As after an uninstall that took the roles away."""
    said = world.sidecar.log.read_text().count("watching the partition fails")
    role = world.kubectl.get("rolebinding", names.SIDECAR_ROLE_BINDING)
    world.kubectl("delete", "rolebinding", names.SIDECAR_ROLE_BINDING)
    try:
        world.proxy.cut()
        wait_until(lambda: world.proxy.count(code=403) > 3, "refusals")
        assert world.sidecar.metric("hbm_sidecar_kube_up") == 0
        assert world.sidecar.control("GET", "/v1/partition").json()["partition"]["mode"] == "fixed"
        assert world.sidecar.ready()
        assert world.sidecar.log.read_text().count("watching the partition fails") == said + 1
    finally:
        role["metadata"] = {"name": names.SIDECAR_ROLE_BINDING}
        world.kubectl.apply(role)
    world.until_applied(world.fixed(0.55))


def test_an_artefact_comes_late_and_is_damaged(world: Running) -> None:
    artefact = {"key": "residual.onnx", "sha256": hashlib.sha256(CONTENT).hexdigest()}
    generation = world.fixed(0.65, artefact=artefact)
    pending = world.until_refused("ArtefactPending")
    assert pending["status"] == "False"
    assert "hbm-policies" in pending["message"]
    world.until_alpha(0.65)  # the rest of the spec does not wait
    (world.policies / "residual.onnx").write_bytes(CONTENT[::-1])
    world.until_refused("ArtefactInvalid")
    assert world.sidecar.ready()
    (world.policies / "residual.onnx").write_bytes(CONTENT)
    assert "residual_gain is 0" in world.until_applied(generation)["message"]
    (world.policies / "residual.onnx").unlink()


def test_a_deleted_partition_holds(world: Running) -> None:
    world.until_alpha(0.5)
    world.kubectl("delete", "hbmp", POD)
    wait_until(
        lambda: world.sidecar.control("GET", "/v1/partition").json()["partition"]["mode"] == "hold",
        "hold",
    )
    assert world.alpha() == pytest.approx(0.5, abs=0.003)
    assert world.sidecar.metric("hbm_sidecar_kube_generation") == 0
    world.until_applied(world.fixed(0.6))


def test_the_predecessors_partition_is_not_ours(world: Running) -> None:
    world.kubectl("delete", "hbmp", POD)
    before = world.sidecar.metric("hbm_sidecar_kube_foreign_partitions_total")
    world.ask(uid="00000000-0000-0000-0000-000000000000", mode="Fixed", alpha={"fixed": 0.9})
    wait_until(
        lambda: world.sidecar.metric("hbm_sidecar_kube_foreign_partitions_total") > before,
        "the foreign partition to be seen",
    )
    answer = world.sidecar.control("GET", "/v1/partition").json()
    assert answer["partition"]["mode"] == "hold"
    assert "that of another pod" in answer["owner"]
    assert world.status() == {}
    world.kubectl("delete", "hbmp", POD)
    world.until_applied(world.fixed(0.3))
    world.until_alpha(0.3)


def test_no_server_yet(world: Running) -> None:
    world.model_server.tell(paused=True)
    try:
        world.until_refused("ServerAbsent")
    finally:
        world.model_server.tell(paused=False)
    world.until_applied(world.status()["observedGeneration"])


# -- who may write a status ---------------------------------------------------------------------


@pytest.fixture
def alone(crds: ApiServer, tmp_path: Path) -> Iterator[World]:
    with FaultProxy(crds) as proxy:
        world = World(crds, proxy, tmp_path)
        yield world
        world.close()


async def test_a_status_is_written_by_its_own_pod_only(alone: World) -> None:
    alone.ask()
    alone.kubectl.apply(pod("other"))
    other_uid = alone.kubectl.get("pod", "other")["metadata"]["uid"]
    token = alone.server.token
    own = token("default", alone.namespace, pod=(POD, alone.pod_uid))
    other = token("default", alone.namespace, pod=("other", other_uid))
    unbound = token("default", alone.namespace)

    async def write(token: str, alpha: float) -> None:
        body = {
            "metadata": {"name": POD, "namespace": alone.namespace},
            "status": {"alpha": alpha},
        }
        async with KubeClient(alone.proxy.config(token=token)) as kube:
            await kube.apply(
                HBM_PARTITIONS, body, field_manager=names.SIDECAR_MANAGER, subresource="status"
            )

    # The admission policy takes a moment to be in force.
    async def refused(token: str) -> str:
        for _ in range(200):
            try:
                await write(token, 0.9)
            except Forbidden as error:
                return str(error)
        raise AssertionError("never refused")

    assert "belongs to the pod with uid" in await refused(other)
    assert "names no pod" in await refused(unbound)
    await write(own, 0.25)
    assert alone.status()["alpha"] == 0.25
    # A pod that comes back under its name gets another partition: the first one's sidecar is late.
    alone.kubectl("delete", "hbmp", POD)
    with pytest.raises(NotFound):
        await write(own, 0.1)
    alone.ask(uid=other_uid)
    with pytest.raises(Forbidden, match=f"uid {other_uid}"):
        await write(own, 0.1)
    assert alone.status() == {}


def test_outside_of_a_cluster_alpha_is_held(
    tmp_path: Path, start_sidecar: Callable[..., Sidecar], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod is not to lose its model server over a sidecar that was set up wrongly."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    sidecar = start_sidecar(
        *("--kube-token-dir", str(tmp_path), "--pod-name", POD, "--pod-uid", "u"),
    )
    answer = sidecar.control("GET", "/v1/partition").json()
    assert answer["partition"]["mode"] == "hold"
    assert "there is none yet" in answer["owner"]
    assert "KUBERNETES_SERVICE_HOST is not set" in sidecar.log.read_text()
    assert sidecar.public("/healthz").status_code == 200


# -- Redis from a Secret ------------------------------------------------------------------------


def test_the_address_of_redis_comes_late_and_changes(
    tmp_path: Path,
    redis: Redis,
    start_sidecar: Callable[..., Sidecar],
    start_server: Callable[..., ModelServer],
) -> None:
    start_server()
    file = tmp_path / "redis" / "url"
    sidecar = start_sidecar(
        *("--redis-url-file", str(file), "--namespace", "late", "--node", "pod-uid"),
        *("--heartbeat-ms", "100", "--mode", "hold"),
    )
    wait_until(sidecar.ready, "ready without Redis")
    assert sidecar.metric("hbm_sidecar_redis_configured") == 0
    assert sidecar.state()["redis"]["error"] == f"{file} is not there yet"
    file.parent.mkdir()
    file.write_text("not an address with a secret in it")
    wait_until(lambda: "no Redis address" in sidecar.state()["redis"]["error"], "a complaint")
    assert "secret" not in sidecar.log.read_text()
    file.write_text(redis.url + "\n")

    def node() -> Any:
        return redis.client.hgetall(codec.node_key("late", "pod-uid"))

    wait_until(node, "the first heartbeat")
    assert codec.node_from_hash(node()).name == "pod-uid"
    assert sidecar.metric("hbm_sidecar_redis_configured") == 1
    file.write_text(redis.url.replace("/0", "/1"))
    wait_until(lambda: not node(), "the keys in the old one to go")
    redis.client.execute_command("SELECT", 1)
    try:
        wait_until(node, "heartbeats in the new one")
        assert sidecar.metric("hbm_sidecar_redis_up") == 1
    finally:
        redis.client.execute_command("SELECT", 0)
