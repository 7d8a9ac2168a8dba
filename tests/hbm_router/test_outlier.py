"""Who may be used: health checks, ejections, and panic."""

from __future__ import annotations

from typing import Any

import pytest
from hbm_router.config import RouterSettings
from hbm_router.discovery import Backend
from hbm_router.fleet import Fleet, Node
from hbm_router.outlier import OutlierDetector, RetryBudget

from tests.hbm_router.backend import response
from tests.hbm_router.http_client import connection, post
from tests.hbm_router.waiting import until


class Bench:
    def __init__(self, count: int, **settings: Any) -> None:
        self.now_s = 50.0
        self.fleet = Fleet()
        self.fleet.update([Backend(f"n{index}", "h", 1) for index in range(count)])
        self.ejected: list[tuple[str, str]] = []
        config = RouterSettings(backends="x=http://h:1", **settings)
        self.outlier = OutlierDetector(
            self.fleet,
            config,
            lambda: self.now_s,
            lambda n, why: self.ejected.append((n.name, why)),
        )

    def node(self, index: int) -> Node:
        return self.fleet.nodes[index]

    def usable(self) -> list[int]:
        return [index for index, ok in enumerate(self.outlier.usable(self.now_s)) if ok]


def test_checks_take_out_after_three_and_back_after_two() -> None:
    b = Bench(3)
    for turn in range(3):
        assert b.usable() == [0, 1, 2], turn
        b.outlier.probed(b.node(0), reachable=True, good=False)
    assert b.usable() == [1, 2]
    b.outlier.probed(b.node(0), reachable=True, good=True)
    b.outlier.probed(b.node(0), reachable=True, good=False)
    b.outlier.probed(b.node(0), reachable=True, good=True)
    assert b.usable() == [1, 2]
    b.outlier.probed(b.node(0), reachable=True, good=True)
    assert b.usable() == [0, 1, 2]
    assert b.ejected == [("n0", "probe")]


def test_a_refused_connection_takes_out_at_once() -> None:
    b = Bench(3)
    b.outlier.unreachable(b.node(1))
    assert b.usable() == [0, 2]
    b.now_s += 1000
    assert b.usable() == [0, 2], "only checks bring it back"
    for _ in range(2):
        b.outlier.probed(b.node(1), reachable=True, good=True)
    assert b.usable() == [0, 1, 2]


def test_without_checks_a_refused_node_returns_after_a_while() -> None:
    b = Bench(3, probe_interval_s=0, ejection_s=5)
    b.outlier.unreachable(b.node(1))
    assert b.usable() == [0, 2]
    b.now_s += 5.1
    assert b.usable() == [0, 1, 2]
    b.outlier.unreachable(b.node(1))
    assert b.usable() == [0, 2]


def test_ejections_double_and_are_forgiven() -> None:
    b = Bench(3, ejection_s=5, max_ejection_s=12)

    def eject() -> float:
        for _ in range(5):
            assert b.usable() == [0, 1, 2]
            b.outlier.failed(b.node(0))
        assert b.usable() == [1, 2]
        begin = b.now_s
        while b.usable() == [1, 2]:
            b.now_s += 0.5
        return b.now_s - begin

    assert [eject() for _ in range(4)] == [5, 10, 12, 12]
    b.outlier.answered(b.node(0), 200)
    assert eject() == 5


@pytest.mark.parametrize(("status", "out"), [(500, True), (502, True), (504, True), (503, False),
                                             (429, False), (404, False), (200, False)])  # fmt: skip
def test_which_answers_are_failures(status: int, out: bool) -> None:
    b = Bench(3)
    for _ in range(20):
        b.outlier.answered(b.node(0), status)
    assert (b.usable() == [1, 2]) is out


def test_one_good_answer_clears_the_count() -> None:
    b = Bench(3)
    for _ in range(10):
        for _ in range(4):
            b.outlier.failed(b.node(0))
        b.outlier.answered(b.node(0), 200)
    assert b.usable() == [0, 1, 2]


def test_panic_uses_everybody_but_the_unreachable() -> None:
    b = Bench(4)
    for index in (0, 1):
        for _ in range(5):
            b.outlier.failed(b.node(index))
    assert b.usable() == [2, 3]
    assert not b.outlier.panic
    b.outlier.unreachable(b.node(2))
    assert b.usable() == [0, 1, 3]
    assert b.outlier.panic
    for index in (0, 1, 3):
        b.outlier.unreachable(b.node(index))
    assert b.usable() == [0, 1, 2, 3]


def test_budget() -> None:
    budget = RetryBudget(0.1, burst=5)
    assert [budget.spend() for _ in range(6)] == [True] * 5 + [False]
    for _ in range(9):
        budget.earn()
    assert not budget.spend()
    for _ in range(2):
        budget.earn()
    assert budget.spend()
    assert not RetryBudget(0).spend()


async def test_health_checks_of_real_backends(backends, router):
    nodes = await backends("a", "b", "c")
    a = nodes[0]
    sick = False

    async def answer(request, reader, writer):
        if request.target == "/v2/health/ready" and sick:
            writer.write(response(b"", status=503))
        else:
            writer.write(response(b"ok", status=404))

    a.answer = answer
    server = await router(nodes, probe_interval_s=0.02)
    node = server.plane.fleet.by_name["a"]

    def healthy() -> bool:
        return bool(server.plane.outlier.healthy(node, server.plane.now_s()))

    await until(lambda: len(a.received) >= 4, "some checks")
    assert healthy(), "404 is an answer"
    sick = True
    await until(lambda: not healthy(), "the sick node to be taken out")
    sick = False
    await until(healthy, "the node to be taken back")
    port = a.port
    await a.stop()
    await until(lambda: node.unreachable, "the stopped node to be noticed without any request")
    async with connection(server.port) as client:
        for user in range(20):
            reply = await client.ask(post(user=f"u{user}"), "POST")
            assert reply.header("x-hbm-node") != "a"
    await a.start(port)
    await until(healthy, "the restarted node to be taken back")


async def test_a_router_that_cannot_time_out_ends_itself(backends, router):
    """A background task that fails is not survived in silence."""
    server = await router(await backends("a"), head_timeout_s=0.1)
    clients, server.plane.clients = server.plane.clients, None
    with pytest.raises(TypeError, match="NoneType"):
        await server.failed
    server.plane.clients = clients


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 64 + ".invalid", "x..y"])
async def test_names_that_do_not_resolve_are_502(router, host):
    from hbm_router.config import RouterSettings
    from hbm_router.server import RouterServer

    server = RouterServer(
        RouterSettings(
            backends=f"a=http://{host}:1", port=0, probe_interval_s=0.02, connect_timeout_s=5
        )
    )
    await server.start()
    try:
        async with connection(server.port) as client:
            reply = await client.ask(post(), "POST")
            assert (reply.status, reply.json()["error"]["reason"]) == (502, "connect_failed")
        assert not server.failed.done()
    finally:
        await server.stop()
