"""The sidecar as a user runs it: real processes and files, every part killed in turn."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hbm_pool.contracts.control_block import SidecarView
from hbm_pool.contracts.records import COMMAND

FIXED = ("--mode", "fixed", "--alpha-fixed", "0.47", "--tick-ms", "50")


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
    except OSError:
        return {}
    return decisions[0] if decisions else {}


def test_commands_reach_a_real_server(start_sidecar, start_server, wait_for) -> None:
    sidecar, server = start_sidecar(*FIXED), start_server()
    wait_for(lambda: abs(server.tell()["alpha"] - 0.47) < 0.01, "α of the server is 0.47")
    assert command_of(sidecar.run_dir)[0] == server.boot_epoch
    decision = newest(sidecar)
    assert decision["mode"] == "fixed"
    assert "MODE_FIXED" in decision["reasons"]
    assert decision["latency_us"] > 0
    assert sidecar.stop() == 0


def test_everything_starts_before_there_is_a_server(start_sidecar, start_server, wait_for) -> None:
    sidecar = start_sidecar(*FIXED, "--node-url", "http://n", "--redis-url", "redis://127.0.0.1:1")
    assert sidecar.public("/healthz").status_code == 200
    answer = sidecar.public("/readyz")
    assert answer.status_code == 503
    assert "server.cb" in answer.json()["missing"]
    server = start_server()
    wait_for(lambda: sidecar.public("/readyz").status_code == 200, "ready without Redis")
    wait_for(lambda: server.tell()["command_generation"] > 0, "the server has a command")
    wait_for(lambda: sidecar.metric("hbm_sidecar_redis_errors_total") > 0, "errors counted")


@pytest.mark.parametrize("child", ["admin", "decide", "twin"])
def test_a_killed_child_comes_back(child, start_sidecar, start_server, wait_for) -> None:
    sidecar, server = start_sidecar(*FIXED), start_server()
    server.tell(traffic=2)
    wait_for(lambda: server.tell()["command_generation"] > 0, "decides")
    wait_for(lambda: sidecar.state()["curves"]["points"] > 0, "the twin has published")
    others = {name: sidecar.pid(name) for name in ("admin", "decide", "twin") if name != child}
    killed = sidecar.pid(child)
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: sidecar.children()[child]["pid"] not in (None, killed), f"{child} is back")
    assert {name: sidecar.pid(name) for name in others} == others
    assert sidecar.children()[child]["last_end"] == "SIGKILL"
    wait_for(sidecar.state, "admin answers")
    before = sidecar.state()["curves"]["monotonic_ns"]
    sidecar.control("PUT", "/v1/partition", json={"mode": "fixed", "alpha_fixed": 0.45})
    wait_for(lambda: abs(server.tell()["alpha"] - 0.45) < 0.01, "the new wish is carried out")
    wait_for(lambda: sidecar.state()["curves"]["monotonic_ns"] > before, "curves go on")
    counted = f'hbm_sidecar_child_restarts_total{{child="{child}"}} 1.0'
    wait_for(lambda: counted in sidecar.public("/metrics").text, "the restart is counted")


def test_children_die_with_a_killed_supervisor_and_the_next_one_takes_over(
    start_sidecar, start_server, wait_for, alive
) -> None:
    sidecar, server = start_sidecar(*FIXED), start_server()
    port = str(sidecar.wait_ready()["port"])
    wait_for(lambda: server.tell()["command_generation"] > 0, "decides")
    pids = [sidecar.pid(name) for name in ("admin", "decide", "twin")]
    assert all(map(alive, pids))
    os.kill(sidecar.process.pid, signal.SIGKILL)
    wait_for(lambda: not any(map(alive, pids)), "children are gone")
    generation = server.tell()["command_generation"]
    start_sidecar("--mode", "fixed", "--alpha-fixed", "0.52", "--tick-ms", "50", "--port", port)
    wait_for(lambda: abs(server.tell()["alpha"] - 0.52) < 0.01, "the next sidecar decides")
    assert server.tell()["command_generation"] > generation


def test_what_admin_shows_to_whom_and_sigterm(start_sidecar, alive, run_dir) -> None:
    sidecar = start_sidecar()
    sidecar.wait_ready()
    mode = (run_dir / "admin.sock").stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert not mode & stat.S_IRWXO
    for path in ("/v1/state", "/v1/partition", "/v1/explain", "/docs", "/openapi.json"):
        assert sidecar.public(path).status_code == 404
    pids = [sidecar.pid(name) for name in ("admin", "decide", "twin")]
    assert sidecar.stop() == 0
    assert not any(map(alive, pids))


def test_sigterm_right_after_the_start(start_sidecar, wait_for, alive) -> None:
    sidecar = start_sidecar()
    pid = sidecar.pid("decide")
    assert sidecar.stop() == 0
    assert not alive(pid)


def test_a_dead_server_is_stale_and_gets_no_command(
    start_sidecar, start_server, wait_for, run_dir
) -> None:
    sidecar, server = start_sidecar(*FIXED, "--stale-ms", "500"), start_server()
    wait_for(lambda: abs(server.tell()["alpha"] - 0.47) < 0.01, "converged")
    server.kill()
    wait_for(lambda: newest(sidecar).get("reasons") == ["TELEMETRY_STALE"], "reported as stale")
    before = command_of(run_dir)
    sidecar.control("PUT", "/v1/partition", json={"mode": "fixed", "alpha_fixed": 0.6})
    pid = sidecar.pid("decide")
    seen = wakes(pid)
    wait_for(lambda: wakes(pid) > seen + 10, "ticks have passed")
    assert command_of(run_dir) == before
    assert newest(sidecar)["applied"] is False
    state = sidecar.state()
    assert state["server"]["fresh"] is False
    assert "server" in sidecar.public("/readyz").json()["missing"]
    assert sidecar.metric("hbm_sidecar_server_up") == 0


def test_a_restarted_server_converges(start_sidecar, start_server, wait_for, run_dir) -> None:
    sidecar, first = start_sidecar(*FIXED), start_server()
    first.tell(cached=[[1, 16], [2, 32]])
    wait_for(lambda: abs(first.tell()["alpha"] - 0.47) < 0.01, "first converged")
    wait_for(lambda: sidecar.state()["residency"]["users"] == 2, "residents mirrored")
    first.kill()
    second = start_server()
    assert second.boot_epoch != first.boot_epoch
    wait_for(lambda: abs(second.tell()["alpha"] - 0.47) < 0.01, "second converged")
    assert command_of(run_dir)[0] == second.boot_epoch
    wait_for(lambda: sidecar.state()["residency"]["users"] == 0, "old residents are forgotten")


def test_a_stalled_server_comes_back_under_the_same_boot(
    start_sidecar, start_server, wait_for
) -> None:
    sidecar, server = start_sidecar(*FIXED, "--stale-ms", "300"), start_server()
    wait_for(lambda: server.tell()["command_generation"] > 0, "decides")
    server.tell(paused=True)
    wait_for(lambda: newest(sidecar).get("reasons") == ["TELEMETRY_STALE"], "stale")
    server.tell(paused=False)
    wait_for(lambda: newest(sidecar).get("applied"), "decides again")


def test_a_fixed_alpha_counts_from_the_first_decision_that_sees_it(
    start_sidecar, start_server, wait_for
) -> None:
    sidecar, server = start_sidecar("--mode", "hold", "--tick-ms", "50"), start_server()
    wait_for(lambda: "MODE_HOLD" in newest(sidecar).get("reasons", ()), "holds")
    assert server.tell()["command_generation"] == 0
    sidecar.control("PUT", "/v1/partition", json={"mode": "fixed", "alpha_fixed": 0.46})
    wait_for(lambda: abs(server.tell()["alpha"] - 0.46) < 0.01, "carried out")
    decisions = sidecar.control("GET", "/v1/explain?last=4000").json()["decisions"]
    first = next(decision for decision in decisions if decision["mode"] == "fixed")
    assert first["applied"], first
    assert first["target"] < 0.5


def test_recommend_decides_and_publishes_but_does_not_apply(
    start_sidecar, start_server, wait_for, run_dir
) -> None:
    sidecar = start_sidecar("--mode", "recommend", "--tick-ms", "50")
    server = start_server()
    server.tell(traffic=4)
    wait_for(lambda: newest(sidecar).get("anchor") is not None, "an anchor is published")
    decision = newest(sidecar)
    assert decision["mode"] == "recommend"
    assert decision["applied"] is False
    assert "MODE_RECOMMEND" in decision["reasons"]
    assert server.tell()["command_generation"] == 0
    assert command_of(run_dir)[1] == 0


def test_auto_follows_the_twin(start_sidecar, start_server, wait_for) -> None:
    sidecar, server = start_sidecar("--tick-ms", "50"), start_server()
    server.tell(traffic=4)
    wait_for(lambda: newest(sidecar).get("anchor") is not None, "an anchor")
    wait_for(lambda: server.tell()["command_generation"] > 0, "a command")
    wait_for(lambda: sidecar.state()["curves"]["requests"] > 0, "curves are seen by admin")
    curves = sidecar.state()["curves"]
    assert curves["boot_epoch"] == server.boot_epoch
    assert curves["alpha"][0] == pytest.approx(0.1, abs=0.01)
    assert curves["alpha"][-1] == pytest.approx(0.9, abs=0.01)


def test_what_was_put_survives_the_sidecar(start_sidecar, wait_for) -> None:
    first = start_sidecar("--mode", "hold")
    first.control("PUT", "/v1/partition", json={"mode": "fixed", "alpha_fixed": 0.35})
    first.stop()
    second = start_sidecar("--mode", "hold")
    partition = second.control("GET", "/v1/partition").json()["partition"]
    assert (partition["mode"], partition["alpha_fixed"]) == ("fixed", 0.35)
    assert second.control("DELETE", "/v1/partition").json()["partition"]["mode"] == "hold"


def test_a_policy_file_owns_the_partition(start_sidecar, start_server, wait_for, tmp_path) -> None:
    path = tmp_path / "policy.json"
    path.write_text('{"mode": "fixed", "alpha_fixed": 0.48, "tick_ms": 50}')
    sidecar, server = start_sidecar("--policy-file", str(path)), start_server()
    wait_for(lambda: abs(server.tell()["alpha"] - 0.48) < 0.01, "the file is obeyed")
    answer = sidecar.control("PUT", "/v1/partition", json={"mode": "hold"})
    assert answer.status_code == 409
    assert str(path) in answer.json()["detail"]
    path.write_text('{"mode": "fixed", "alpha_fixed": 4.5}')
    wait_for(lambda: sidecar.metric("hbm_sidecar_policy_rejected_total") == 1, "refused, counted")
    partition = sidecar.control("GET", "/v1/partition").json()
    assert partition["partition"]["alpha_fixed"] == 0.48
    assert "alpha_fixed" in partition["problem"]
    path.write_text('{"mode": "fixed", "alpha_fixed": 0.5, "tick_ms": 50}')
    wait_for(lambda: abs(server.tell()["alpha"] - 0.5) < 0.01, "the next good content is obeyed")


def test_a_foreign_control_block_is_refused_and_counted(
    start_sidecar, start_server, wait_for, run_dir
) -> None:
    (run_dir / "server.cb").write_bytes(os.urandom(1 << 16))
    sidecar = start_sidecar(*FIXED)
    wait_for(
        lambda: sidecar.metric("hbm_sidecar_control_block_errors_total") > 0, "counted as refused"
    )
    assert "server.cb" in sidecar.public("/readyz").json()["missing"]
    assert "no control block" in sidecar.log.read_text()
    server = start_server()
    wait_for(lambda: server.tell()["command_generation"] > 0, "the real server is found")


def test_without_room_for_its_file_it_stays_up_and_tries_again(
    start_sidecar, start_server, wait_for, run_dir
) -> None:
    (run_dir / "sidecar.cb").mkdir()
    sidecar, server = start_sidecar(*FIXED), start_server()
    assert sidecar.public("/healthz").status_code == 200
    assert "sidecar.cb" in sidecar.public("/readyz").json()["missing"]
    assert server.tell()["command_generation"] == 0
    (run_dir / "sidecar.cb").rmdir()
    wait_for(lambda: server.tell()["command_generation"] > 0, "decides once there is room")


def test_two_sidecars_on_one_machine(start_sidecar, start_server, wait_for, tmp_path) -> None:
    pairs = []
    for name, alpha in (("a", "0.47"), ("b", "0.53")):
        directory = tmp_path / name
        directory.mkdir()
        flags = ("--mode", "fixed", "--alpha-fixed", alpha, "--tick-ms", "50", "--node", name)
        pairs.append((start_sidecar(*flags, directory=directory), start_server(directory), alpha))
    for _, server, alpha in pairs:
        wait_for(lambda s=server, a=float(alpha): abs(s.tell()["alpha"] - a) < 0.01, "converged")
    assert pairs[0][0].wait_ready()["port"] != pairs[1][0].wait_ready()["port"]


def test_memory_of_all_processes_and_no_torch(start_sidecar, start_server, wait_for) -> None:
    sidecar, server = start_sidecar(*FIXED), start_server()
    server.tell(traffic=4)
    wait_for(lambda: sidecar.state().get("curves", {}).get("requests", 0) > 100, "the twin works")
    pids = [sidecar.process.pid, *(sidecar.pid(name) for name in ("admin", "decide", "twin"))]
    resident_kib = 0
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        resident_kib += int(next(line for line in status if line.startswith("VmRSS")).split()[1])
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    assert resident_kib <= 400 * 1024
