"""What the router will find in a real Redis."""

from __future__ import annotations

import os
import signal
from typing import Any

from hbm_pool.contracts import digest as codec
from hbm_pool.contracts.identity import digest_key

NAMESPACE, NODE = "shop", "node-1"


FLAGS = (
    *("--mode", "hold", "--heartbeat-ms", "100", "--stale-ms", "500"),
    *("--namespace", NAMESPACE, "--node", NODE, "--node-url", "http://10.0.0.1:8000"),
)
SHARED_FLAGS = (*FLAGS, "--redis-url", "{redis}")


def digest_of(redis: Any) -> dict[int, int] | None:
    """Tokens by key, as the router would decode them; None while there is none."""
    blob = redis.client.get(codec.digest_key_name(NAMESPACE, NODE))
    if blob is None:
        return None
    digest = codec.decode_digest(blob)
    return dict(zip(digest.keys.tolist(), digest.tokens.tolist(), strict=True))


def shards_of(redis: Any) -> list[int]:
    """EMB coverage in the digest; none while there is none."""
    blob = redis.client.get(codec.digest_key_name(NAMESPACE, NODE))
    return [] if blob is None else codec.decode_digest(blob).shard_rows.tolist()


def state_of(redis: Any) -> codec.NodeState | None:
    fields = redis.client.hgetall(codec.node_key(NAMESPACE, NODE))
    return codec.node_from_hash(fields) if fields else None


def said(redis: Any, **fields: Any) -> codec.NodeState | None:
    """The state once it says all of this."""
    state = state_of(redis)
    if state is None or any(getattr(state, name) != value for name, value in fields.items()):
        return None
    return state


def residents(server: Any) -> dict[int, int]:
    return {digest_key(user): tokens for user, tokens in server.tell()["residents"]}


def test_heartbeat_and_digest(start_sidecar, start_server, redis, wait_for) -> None:
    server, sidecar = start_server(), start_sidecar(*FLAGS, "--redis-url", redis.url)
    server.tell(cached=[[5, 16], [-9, 64], [1 << 50, 32]], set={"queue_depth": 3, "alpha": 0.25})
    wait_for(lambda: digest_of(redis) == residents(server), "the digest names the residents")
    state = wait_for(lambda: said(redis, queue_depth=3), "the heartbeat tells the load")
    assert (state.name, state.url, state.model) == (NODE, "http://10.0.0.1:8000", "test-model")
    assert (state.boot_epoch, state.page_tokens) == (server.boot_epoch, 16)
    assert state.alpha == 0.25
    assert state.cost_token_ms == 0.01
    wait_for(lambda: len(shards_of(redis)) == 8, "EMB coverage is known")
    assert redis.client.zscore(codec.nodes_key(NAMESPACE), NODE) > 0
    for key in (codec.node_key(NAMESPACE, NODE), codec.digest_key_name(NAMESPACE, NODE)):
        # Between two heartbeats that come late a key is gone (-2).
        left_ms = wait_for(lambda k=key: max(0, redis.client.pttl(k)), "the key expires")
        assert left_ms <= 5 * 100
    server.tell(cached=[[5, 0], [7, 48]])
    wait_for(lambda: digest_of(redis) == residents(server), "changes follow")
    assert sidecar.metric("hbm_sidecar_digest_bytes") > 0
    assert sidecar.metric("hbm_sidecar_redis_up") == 1
    server.tell(set={"draining": 1})
    wait_for(lambda: said(redis, draining=True), "draining is published")
    assert sidecar.stop() == 0
    assert redis.client.keys("hbm:*") == []


def test_state_and_digest_agree(pair, redis, wait_for) -> None:
    _, server = pair
    server.tell(cached=[[5, 16]])

    def agree() -> bool:
        pipe = redis.client.pipeline(transaction=True)
        pipe.hgetall(codec.node_key(NAMESPACE, NODE))
        pipe.get(codec.digest_key_name(NAMESPACE, NODE))
        fields, blob = pipe.execute()
        if not fields or not blob:
            return False
        state = codec.node_from_hash(fields)
        if state.boot_epoch != server.boot_epoch:
            return False
        assert codec.digest_crc(blob) == state.digest_crc
        assert codec.decode_digest(blob).sequence == state.digest_sequence
        return digest_of(redis) == {5: 16}

    wait_for(agree, "one transaction names one digest")
    redis.client.flushall()
    wait_for(agree, "keys lost in Redis come back")


def test_digest_is_exact_after_a_gap_in_the_ring(pair, redis, wait_for) -> None:
    sidecar, server = pair
    gaps, taken = (
        sidecar.metric(f"hbm_sidecar_residency_{name}_total")
        for name in ("gaps", "snapshots_taken")
    )
    server.tell(cached=[[1, 16], [2, 32]])
    wait_for(lambda: digest_of(redis) == residents(server), "in step")
    admin = sidecar.pid("admin")
    os.kill(admin, signal.SIGSTOP)
    try:
        server.tell(flood=70_000)
    finally:
        os.kill(admin, signal.SIGCONT)
    wait_for(lambda: sidecar.metric("hbm_sidecar_residency_gaps_total") > gaps, "the gap is seen")
    wait_for(lambda: sidecar.metric("hbm_sidecar_residency_exact") == 1, "a snapshot is taken over")
    wait_for(lambda: digest_of(redis) == residents(server), "in step again")
    assert sidecar.metric("hbm_sidecar_residency_snapshots_taken_total") > taken
    server.tell(cached=[[1, 0], [99, 160]])
    wait_for(lambda: digest_of(redis) == residents(server), "events go on behind the snapshot")


def test_digest_is_exact_after_admin_was_killed(pair, redis, wait_for) -> None:
    sidecar, server = pair
    server.tell(cached=[[user, 16] for user in range(100)])
    wait_for(lambda: digest_of(redis) == residents(server), "in step")
    before = wait_for(lambda: state_of(redis), "a heartbeat")
    os.kill(sidecar.pid("admin"), signal.SIGKILL)
    server.tell(cached=[[user, 0] for user in range(0, 100, 2)])
    wait_for(lambda: digest_of(redis) == residents(server), "in step again")
    after = wait_for(lambda: state_of(redis), "a heartbeat")
    assert after.sequence > before.sequence
    assert after.digest_sequence > before.digest_sequence


def test_redis_may_die_and_come_back_empty(pair, redis, wait_for) -> None:
    sidecar, server = pair
    server.tell(cached=[[5, 16]])
    wait_for(lambda: digest_of(redis) == {5: 16}, "published")
    redis.kill()
    wait_for(lambda: sidecar.metric("hbm_sidecar_redis_up") == 0, "noticed")
    assert sidecar.metric("hbm_sidecar_redis_errors_total") > 0
    assert sidecar.state()["redis"]["error"]
    server.tell(cached=[[6, 32]])
    wait_for(lambda: sidecar.state()["residency"]["users"] == 2, "the mirror goes on")
    wait_for(sidecar.ready, "ready without Redis")
    redis.start()
    wait_for(lambda: digest_of(redis) == {5: 16, 6: 32}, "the whole digest is back")
    wait_for(lambda: state_of(redis), "the state is back")


def test_a_redis_that_hangs_holds_nothing_up(pair, redis, wait_for) -> None:
    sidecar, server = pair
    server.tell(cached=[[5, 16]])
    wait_for(lambda: digest_of(redis) == {5: 16}, "published")
    redis.suspend()
    try:
        wait_for(lambda: sidecar.metric("hbm_sidecar_redis_up") == 0, "noticed")
        server.tell(cached=[[6, 32]])
        wait_for(lambda: sidecar.state()["residency"]["users"] == 2, "the mirror goes on")
    finally:
        redis.resume()
    wait_for(lambda: digest_of(redis) == {5: 16, 6: 32}, "published again")


def test_a_dead_server_leaves_the_routers_sight(pair, start_server, redis, wait_for) -> None:
    sidecar, server = pair
    server.tell(cached=[[5, 16]])
    wait_for(lambda: digest_of(redis) == {5: 16}, "published")
    server.kill()
    wait_for(lambda: state_of(redis) is None and digest_of(redis) is None, "keys have expired")
    again = start_server(sidecar.run_dir)
    wait_for(lambda: digest_of(redis) == {}, "the new server holds nobody")
    wait_for(lambda: said(redis, boot_epoch=again.boot_epoch), "its heartbeat is there")


def test_senseless_telemetry_is_not_published(pair, redis, wait_for) -> None:
    sidecar, server = pair
    errors = sidecar.metric("hbm_sidecar_redis_errors_total")
    server.tell(set={"alpha": 7.0})
    wait_for(lambda: sidecar.metric("hbm_sidecar_redis_errors_total") > errors, "counted")
    wait_for(lambda: state_of(redis) is None, "what was said before has expired")
    server.tell(set={"alpha": 0.5})
    wait_for(lambda: said(redis, alpha=0.5), "published once it makes sense")
