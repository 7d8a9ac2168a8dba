"""The sidecar as a user runs it: real processes and files, every part killed in turn."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hbm_pool.contracts.control_block import SidecarBlock, SidecarView
from hbm_pool.contracts.records import COMMAND, CURVES

FIXED = ("--mode", "fixed", "--alpha-fixed", "0.47", "--tick-ms", "50")
SHARED_FLAGS = (*FIXED, "--stale-ms", "1000")


def command_of(run_dir: Path) -> tuple[int, int, float]:
    """Boot epoch, generation and α of the newest command."""
    record = np.zeros((), dtype=COMMAND)
    SidecarView.open(run_dir).read_command(record)
    return int(record["boot_epoch"]), int(record["generation"]), float(record["alpha"])


def wakes(pid: int) -> int:
    """How often a process has gone to sleep: decide does once per tick."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("voluntary"))
    return int(line.split()[1])


def newest(sidecar: Any) -> dict[str, Any]:
    """The newest decision; empty before the first, and while admin is away."""
    try:
        decisions = sidecar.control("GET", "/v1/explain?last=1").json()["decisions"]
    except httpx.TransportError:
        return {}
    return decisions[0] if decisions else {}


def missing(sidecar: Any) -> dict[str, str]:
    """What keeps it from being ready; nothing while admin is away."""
    try:
        return sidecar.public("/readyz").json().get("missing", {})
    except httpx.TransportError:
        return {}


def wished(decision: dict[str, Any]) -> dict[str, Any] | None:
    """The decision, if the layers below the shield had a wish."""
    wish = decision["layers"]["shield"]["wish"] if decision else None
    return decision if wish is not None else None


def reasoned(sidecar: Any, reason: str, after: int = -1) -> dict[str, Any]:
    """The newest decision if it states the reason and comes after that tick, else nothing."""
    decision = newest(sidecar)
    stated = reason in decision.get("reasons", ()) and decision["tick"] > after
    return decision if stated else {}


def curves(sidecar: Any) -> dict[str, Any]:
    """The twin's newest, as admin sees them; nothing while there are none or admin is away."""
    found = sidecar.state().get("curves", {})
    return found if found.get("points") else {}


def test_commands_reach_a_real_server(pair, wait_for) -> None:
    sidecar, server = pair
    wait_for(lambda: abs(server.tell()["alpha"] - 0.47) < 0.01, "α of the server is 0.47")
    assert command_of(sidecar.run_dir)[0] == server.boot_epoch
    decision = wait_for(lambda: reasoned(sidecar, "MODE_FIXED"), "a decision of mode fixed")
    assert decision["mode"] == "fixed"
    assert decision["latency_us"] > 0


def test_starts_before_there_is_a_server_and_ends_on_sigterm(
    start_sidecar, start_server, wait_for, alive
) -> None:
    sidecar = start_sidecar(*FIXED, "--node-url", "http://n", "--redis-url", "redis://127.0.0.1:1")
    assert sidecar.public("/healthz").status_code == 200
    answer = sidecar.public("/readyz")
    assert answer.status_code == 503
    assert "server.cb" in answer.json()["missing"]
    server = start_server()
    wait_for(sidecar.ready, "ready without Redis")
    wait_for(lambda: server.tell()["command_generation"] > 0, "the server has a command")
    wait_for(lambda: sidecar.metric("hbm_sidecar_redis_errors_total") > 0, "errors counted")
    pids = [sidecar.pid(name) for name in ("admin", "decide", "twin")]
    assert sidecar.stop() == 0
    assert not any(map(alive, pids))


@pytest.mark.parametrize("child", ["admin", "decide", "twin"])
def test_a_killed_child_comes_back(child, pair, wait_for) -> None:
    sidecar, server = pair
    server.tell(traffic=2)
    wait_for(lambda: server.tell()["command_generation"] > 0, "decides")
    wait_for(lambda: curves(sidecar).get("boot_epoch") == server.boot_epoch, "the twin publishes")
    others = {name: sidecar.pid(name) for name in ("admin", "decide", "twin") if name != child}
    killed = sidecar.pid(child)
    restarts = sidecar.children()[child]["restarts"]
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: sidecar.children()[child]["pid"] not in (None, killed), f"{child} is back")
    assert {name: sidecar.pid(name) for name in others} == others
    assert sidecar.children()[child]["last_end"] == "SIGKILL"
    before = wait_for(lambda: curves(sidecar).get("monotonic_ns"), "admin answers, with curves")
    sidecar.control("PUT", "/v1/partition", json={"mode": "fixed", "alpha_fixed": 0.45})
    wait_for(lambda: abs(server.tell()["alpha"] - 0.45) < 0.01, "the new wish is carried out")
    wait_for(lambda: curves(sidecar).get("monotonic_ns", 0) > before, "curves go on")
    counted = f'hbm_sidecar_child_restarts_total{{child="{child}"}} {restarts + 1:.1f}'
    wait_for(lambda: counted in sidecar.public("/metrics").text, "the restart is counted")


def test_children_die_with_a_killed_supervisor_and_the_next_one_takes_over(
    start_sidecar, start_server, wait_for, alive
) -> None:
    sidecar, server = start_sidecar(*FIXED), start_server()
    port = str(sidecar.wait_ready()["port"])
    wait_for(lambda: server.tell()["command_generation"] > 0, "decides")
    put = {"mode": "fixed", "alpha_fixed": 0.52}
    assert sidecar.control("PUT", "/v1/partition", json=put).status_code == 200
    pids = [sidecar.pid(name) for name in ("admin", "decide", "twin")]
    assert all(map(alive, pids))
    os.kill(sidecar.process.pid, signal.SIGKILL)
    wait_for(lambda: not any(map(alive, pids)), "children are gone")
    generation = server.tell()["command_generation"]
    again = start_sidecar(*FIXED, "--port", port)
    wait_for(lambda: abs(server.tell()["alpha"] - 0.52) < 0.01, "what was put survives")
    assert again.control("GET", "/v1/partition").json()["partition"]["alpha_fixed"] == 0.52
    reset = again.control("DELETE", "/v1/partition").json()["partition"]
    assert reset["alpha_fixed"] == 0.47
    wait_for(lambda: abs(server.tell()["alpha"] - 0.47) < 0.01, "the next sidecar decides")
    assert server.tell()["command_generation"] > generation


def test_what_admin_shows_to_whom(shared) -> None:
    shared.wait_ready()
    mode = (shared.run_dir / "admin.sock").stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert not mode & stat.S_IRWXO
    for path in ("/v1/state", "/v1/partition", "/v1/explain", "/docs", "/openapi.json"):
        assert shared.public(path).status_code == 404


def test_sigterm_right_after_the_start(start_sidecar, wait_for, alive) -> None:
    sidecar = start_sidecar()
    pid = sidecar.pid("decide")
    assert sidecar.stop() == 0
    assert not alive(pid)


def test_a_dead_server_is_stale_and_gets_no_command(pair, wait_for) -> None:
    sidecar, server = pair
    wait_for(lambda: abs(server.tell()["alpha"] - 0.47) < 0.01, "converged")
    server.kill()
    wait_for(lambda: newest(sidecar).get("reasons") == ["TELEMETRY_STALE"], "reported as stale")
    before = command_of(sidecar.run_dir)
    sidecar.control("PUT", "/v1/partition", json={"mode": "fixed", "alpha_fixed": 0.6})
    pid = sidecar.pid("decide")
    seen = wakes(pid)
    wait_for(lambda: wakes(pid) > seen + 10, "ticks have passed")
    assert command_of(sidecar.run_dir) == before
    assert newest(sidecar)["applied"] is False
    assert sidecar.state()["server"]["fresh"] is False
    assert "server" in missing(sidecar)
    assert sidecar.metric("hbm_sidecar_server_up") == 0


def test_a_restarted_server_converges(pair, start_server, wait_for) -> None:
    sidecar, first = pair
    first.tell(cached=[[1, 16], [2, 32]])
    wait_for(lambda: abs(first.tell()["alpha"] - 0.47) < 0.01, "first converged")
    wait_for(lambda: sidecar.state()["residency"]["users"] == 2, "residents mirrored")
    first.kill()
    second = start_server(sidecar.run_dir)
    assert second.boot_epoch != first.boot_epoch
    wait_for(lambda: abs(second.tell()["alpha"] - 0.47) < 0.01, "second converged")
    assert command_of(sidecar.run_dir)[0] == second.boot_epoch
    wait_for(lambda: sidecar.state()["residency"]["users"] == 0, "old residents are forgotten")


def test_a_stalled_server_comes_back_under_the_same_boot(pair, wait_for) -> None:
    sidecar, server = pair
    wait_for(lambda: server.tell()["command_generation"] > 0, "decides")
    server.tell(paused=True)
    wait_for(lambda: newest(sidecar).get("reasons") == ["TELEMETRY_STALE"], "stale")
    server.tell(paused=False)
    wait_for(lambda: newest(sidecar).get("applied"), "decides again")


def test_a_fixed_alpha_counts_from_the_first_decision_that_sees_it(
    shared, start_server, wait_for
) -> None:
    sidecar = shared
    wait_for(sidecar.state, "admin answers")
    sidecar.control("PUT", "/v1/partition", json={"mode": "hold", "tick_ms": 50})
    wait_for(lambda: sidecar.state()["server"]["fresh"] is False, "no server of another test")
    began = newest(sidecar).get("tick", 0)
    server = start_server(sidecar.run_dir)
    wait_for(lambda: reasoned(sidecar, "MODE_HOLD", after=began), "holds")
    assert server.tell()["command_generation"] == 0
    held = newest(sidecar)["tick"]
    sidecar.control("PUT", "/v1/partition", json={"mode": "fixed", "alpha_fixed": 0.46})
    wait_for(lambda: abs(server.tell()["alpha"] - 0.46) < 0.01, "carried out")
    decisions = sidecar.control("GET", "/v1/explain?last=4000").json()["decisions"]
    # On a machine that held the server up for so long nothing is decided at all.
    first = next(
        each
        for each in decisions
        if each["tick"] > held
        and each["mode"] == "fixed"
        and "TELEMETRY_STALE" not in each["reasons"]
    )
    assert first["applied"], first["reasons"]
    assert first["target"] < 0.5


def test_recommend_decides_and_publishes_but_does_not_apply(shared, start_server, wait_for) -> None:
    sidecar = shared
    wait_for(sidecar.state, "admin answers")
    sidecar.control("PUT", "/v1/partition", json={"mode": "recommend", "tick_ms": 50})
    wait_for(lambda: sidecar.state()["server"]["fresh"] is False, "no server of another test")
    before = command_of(sidecar.run_dir)
    server = start_server(sidecar.run_dir)
    server.tell(traffic=4)

    def anchored() -> dict[str, Any] | None:
        decision = reasoned(sidecar, "MODE_RECOMMEND")
        sees = curves(sidecar).get("boot_epoch") == server.boot_epoch
        return decision if sees and decision and decision["anchor"] is not None else None

    decision = wait_for(anchored, "an anchor is published")
    assert decision["mode"] == "recommend"
    assert decision["applied"] is False
    layers = decision["layers"]
    assert layers["anchor"]["anchor"] == decision["anchor"]
    assert layers["gate"]["phase"] == "normal"
    assert layers["residual"]["asked"] is False
    assert layers["shield"]["goal"] is not None
    said = sidecar.control("GET", "/v1/explain?last=1").json()
    assert said["residual"]["used"] == ""
    assert said["policy"]["residual_gain"] == 0.0

    def learned() -> dict[str, Any] | None:
        prices = sidecar.control("GET", "/v1/explain?last=1").json()["prices"]
        return prices if prices.get("batches", 0) > 200 else None

    trusted = wait_for(lambda: wished(newest(sidecar)), "the twin is warm")
    assert trusted["layers"]["shield"]["wish"] == pytest.approx(
        trusted["layers"]["anchor"]["anchor"]
    )
    assert trusted["applied"] is False
    # The server's batches take what it declares.
    for pair in wait_for(learned, "prices are learned")["constants"].values():
        assert pair["used"] == pytest.approx(pair["declared"], rel=0.05)
    assert server.tell()["command_generation"] == 0
    assert command_of(sidecar.run_dir) == before


def test_auto_follows_the_twin(pair, wait_for) -> None:
    sidecar, server = pair
    sidecar.control("PUT", "/v1/partition", json={"mode": "auto", "tick_ms": 50})
    generation = server.tell(traffic=4)["command_generation"]
    wait_for(lambda: newest(sidecar).get("mode") == "auto", "decides by itself")
    wait_for(lambda: curves(sidecar).get("boot_epoch") == server.boot_epoch, "curves are seen")
    wait_for(lambda: newest(sidecar).get("anchor") is not None, "an anchor")
    wait_for(lambda: server.tell()["command_generation"] > generation, "a command")
    found = wait_for(lambda: curves(sidecar), "curves are seen by admin")
    assert found["requests"] > 0
    assert found["alpha"][0] == pytest.approx(0.1, abs=0.01)
    assert found["alpha"][-1] == pytest.approx(0.9, abs=0.01)


def test_a_suspended_twin_is_stale_and_comes_back(pair, wait_for) -> None:
    sidecar, server = pair
    sidecar.control("PUT", "/v1/partition", json={"mode": "auto", "tick_ms": 50})
    server.tell(traffic=4)
    # The newest decision may still be about another server, and its anchor another twin's.
    wait_for(lambda: curves(sidecar).get("boot_epoch") == server.boot_epoch, "curves of this one")
    wait_for(lambda: newest(sidecar).get("anchor") is not None, "an anchor")
    twin = sidecar.pid("twin")
    os.kill(twin, signal.SIGSTOP)
    try:
        wait_for(lambda: reasoned(sidecar, "CURVES_STALE"), "said that the twin is stuck")
    finally:
        os.kill(twin, signal.SIGCONT)
    wait_for(lambda: "CURVES_STALE" not in newest(sidecar).get("reasons", ["CURVES_STALE"]), "back")
    assert sidecar.pid("twin") == twin


def test_a_suspended_decide_goes_on_where_it_was(pair, wait_for) -> None:
    sidecar, server = pair
    wait_for(lambda: abs(server.tell()["alpha"] - 0.47) < 0.01, "converged")
    moves = sidecar.metric("hbm_sidecar_moves_total")
    before = server.tell()["command_generation"]
    decide = sidecar.pid("decide")
    os.kill(decide, signal.SIGSTOP)
    try:
        wait_for(lambda: "decide" in missing(sidecar), "its silence is noticed")
        assert abs(server.tell()["alpha"] - 0.47) < 0.01
    finally:
        os.kill(decide, signal.SIGCONT)
    sidecar.control("PUT", "/v1/partition", json={"mode": "fixed", "alpha_fixed": 0.55})
    wait_for(lambda: abs(server.tell()["alpha"] - 0.55) < 0.01, "the new wish is carried out")
    assert sidecar.pid("decide") == decide
    wait_for(lambda: sidecar.metric("hbm_sidecar_moves_total") > moves, "moves are counted")
    steps = server.tell()["command_generation"] - before
    assert sidecar.metric("hbm_sidecar_moves_total") - moves < steps, "not their steps"


def test_a_policy_file_owns_the_partition_beside_another_sidecar(
    pair, start_sidecar, start_server, wait_for, tmp_path
) -> None:
    path = tmp_path / "policy.json"
    path.write_text('{"mode": "fixed", "alpha_fixed": 0.53, "tick_ms": 50}')
    sidecar, server = start_sidecar("--policy-file", str(path)), start_server()
    wait_for(lambda: abs(server.tell()["alpha"] - 0.53) < 0.01, "the file is obeyed")
    other, others_server = pair
    wait_for(lambda: abs(others_server.tell()["alpha"] - 0.47) < 0.01, "the other one, too")
    assert sidecar.wait_ready()["port"] != other.wait_ready()["port"]
    answer = sidecar.control("PUT", "/v1/partition", json={"mode": "hold"})
    assert answer.status_code == 409
    assert str(path) in answer.json()["detail"]
    path.write_text('{"mode": "fixed", "alpha_fixed": 4.5}')
    wait_for(lambda: sidecar.metric("hbm_sidecar_policy_rejected_total") == 1, "refused, counted")
    partition = sidecar.control("GET", "/v1/partition").json()
    assert partition["partition"]["alpha_fixed"] == 0.53
    assert "alpha_fixed" in partition["problem"]
    path.write_text('{"mode": "fixed", "alpha_fixed": 0.5, "tick_ms": 50}')
    wait_for(lambda: abs(server.tell()["alpha"] - 0.5) < 0.01, "the next good content is obeyed")


def test_a_foreign_control_block_is_refused_and_counted(pair, start_server, wait_for) -> None:
    sidecar, server = pair
    server.kill()
    refused = sidecar.metric("hbm_sidecar_control_block_errors_total")
    foreign = sidecar.run_dir / "foreign"
    foreign.write_bytes(os.urandom(1 << 16))
    foreign.rename(sidecar.run_dir / "server.cb")
    wait_for(lambda: sidecar.metric("hbm_sidecar_control_block_errors_total") > refused, "counted")
    wait_for(lambda: "server.cb" in missing(sidecar), "said")
    assert "no control block" in sidecar.log.read_text()
    again = start_server(sidecar.run_dir)
    wait_for(lambda: again.tell()["command_generation"] > 0, "the real server is found")


def test_without_room_for_its_file_it_stays_up_and_tries_again(
    start_sidecar, start_server, wait_for, run_dir
) -> None:
    (run_dir / "sidecar.cb").mkdir()
    sidecar, server = start_sidecar(*FIXED), start_server()
    assert sidecar.public("/healthz").status_code == 200
    assert "sidecar.cb" in missing(sidecar)
    assert server.tell()["command_generation"] == 0
    (run_dir / "sidecar.cb").rmdir()
    wait_for(lambda: server.tell()["command_generation"] > 0, "decides once there is room")


def test_what_is_deleted_from_the_run_directory_is_made_anew(
    start_sidecar, start_server, wait_for, run_dir
) -> None:
    sidecar, server = start_sidecar(*FIXED), start_server()
    wait_for(lambda: abs(server.tell()["alpha"] - 0.47) < 0.01, "converged")
    pids = {name: sidecar.pid(name) for name in ("admin", "decide", "twin")}
    ours = ("sidecar.cb", "sidecar.children.json", "sidecar.lock", "admin.sock")
    before = {name: (run_dir / name).stat().st_ino for name in ours}
    kept = [(run_dir / name).open("rb") for name in ours[:3]]  # no inode is used twice
    for name in ours:
        (run_dir / name).unlink()
    wait_for(lambda: all((run_dir / name).exists() for name in ours), "all is there again")
    assert all((run_dir / name).stat().st_ino != before[name] for name in ours[:3])
    put = {"mode": "fixed", "alpha_fixed": 0.55}
    wait_for(lambda: sidecar.state(), "admin answers on its new socket")
    assert sidecar.control("PUT", "/v1/partition", json=put).status_code == 200
    wait_for(lambda: abs(server.tell()["alpha"] - 0.55) < 0.01, "the server maps the new file")
    assert {name: sidecar.pid(name) for name in pids} == pids, "nobody had to be restarted"
    said = sidecar.log.read_text().splitlines()
    for name in ours:
        gone = [json.loads(line) for line in said if name in line and "is gone" in line]
        assert len(gone) == 1, name
    second = start_sidecar("--port", "0")
    assert second.process.wait(60) == 2
    assert str(sidecar.process.pid) in second.log.read_text()
    for file in kept:
        file.close()


def test_sigterm_ends_a_twin_that_compiles(start_server, run_dir, tmp_path, wait_for) -> None:
    SidecarBlock.create(run_dir)
    server = start_server()
    cache = tmp_path / "empty"
    twin = subprocess.Popen(
        [sys.executable, "-m", "hbm_sidecar.twin"],
        env=os.environ | {"HBM_RUN_DIR": str(run_dir), "NUMBA_CACHE_DIR": str(cache)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert twin.stderr is not None
    assert "twin starts" in twin.stderr.readline()
    server.tell(traffic=4)
    # The first finished kernel is in the cache: the rest of them takes many seconds more.
    wait_for(lambda: [*cache.rglob("*.nbi")], "it compiles")
    twin.terminate()
    assert twin.wait(60) == -signal.SIGTERM
    curves = np.zeros((), dtype=CURVES)
    assert not SidecarView.open(run_dir).read_curves(curves), "it was still compiling"


def test_memory_of_all_processes_and_no_torch(pair, wait_for) -> None:
    sidecar, server = pair
    server.tell(traffic=4)
    wait_for(lambda: curves(sidecar).get("requests", 0) > 100, "the twin works")
    pids = [sidecar.process.pid, *(sidecar.pid(name) for name in ("admin", "decide", "twin"))]
    resident_kib = 0
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        resident_kib += int(next(line for line in status if line.startswith("VmRSS")).split()[1])
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    assert resident_kib <= 400 * 1024
