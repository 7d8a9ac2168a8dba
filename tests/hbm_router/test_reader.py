"""What nodes publish in Redis: believed when whole, theirs and new; else counted and survived."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
from hbm_pool.contracts import digest as contract
from hbm_pool.contracts.identity import digest_key, user_hash
from hbm_router.config import RouterSettings
from hbm_router.cost import CostTable
from hbm_router.metrics import RouterMetrics
from hbm_router.reader import Collector, Rejected, SnapshotReader, accept_digest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hbm_router.published import Publisher, RedisProcess, make_digest, node_state

USER = user_hash("u1")


@dataclasses.dataclass
class Target:
    """Takes snapshots where the data path would."""

    names: tuple[str, ...]
    table: CostTable | None = None
    offers: int = 0

    def offer(self, table: CostTable) -> None:
        self.table = table
        self.offers += 1


@dataclasses.dataclass
class Setup:
    reader: SnapshotReader
    target: Target
    metrics: RouterMetrics
    now_s: list[float]

    def rejected(self) -> dict[str, float]:
        (family,) = [
            family
            for family in self.metrics.registry.collect()
            if family.name == "hbm_router_digest_rejected"
        ]
        return {
            sample.labels["reason"]: sample.value
            for sample in family.samples
            if sample.name.endswith("_total")
        }

    def holders(self, user: int = USER) -> dict[str, int]:
        assert self.target.table is not None
        snapshot = self.target.table.snapshot
        return {
            snapshot.names[index]: tokens for index, tokens in snapshot.holders(digest_key(user))
        }


@pytest.fixture
def setup(redis_server: RedisProcess) -> Setup:
    return make_setup(redis_server.url)


def make_setup(url: str, names: tuple[str, ...] = ("a", "b"), **settings: Any) -> Setup:
    config = RouterSettings(
        backends=",".join(f"{name}=http://h:1" for name in names), redis_url=url, **settings
    )
    target, metrics, now_s = Target(names), RouterMetrics(), [100.0]
    reader = SnapshotReader(config, target, metrics, clock=lambda: now_s[0])
    return Setup(reader, target, metrics, now_s)


def test_reads_states_and_digests(setup: Setup, publisher: Publisher) -> None:
    publisher.heartbeat("a", {USER: 320, 5: 16}, queue_ms=3.5)
    publisher.heartbeat("b", {6: 32})
    assert setup.reader.poll()
    assert setup.holders() == {"a": 320}
    table = setup.target.table
    assert table is not None
    assert table.queue_ms.tolist() == [3.5, 0.0]
    assert table.known.all()
    assert setup.rejected() == {}


def test_a_user_on_two_nodes(setup: Setup, publisher: Publisher) -> None:
    publisher.heartbeat("a", {USER: 320})
    publisher.heartbeat("b", {USER: 64})
    setup.reader.poll()
    assert setup.holders() == {"a": 320, "b": 64}
    publisher.heartbeat("a", {})
    setup.reader.poll()
    assert setup.holders() == {"b": 64}


def test_only_changed_digests_are_fetched(
    setup: Setup, publisher: Publisher, redis_server: RedisProcess
) -> None:
    state = publisher.heartbeat("a", {USER: 320})
    publisher.heartbeat("b", {})
    setup.reader.poll()

    def gets() -> int:
        stats = redis_server.client.info("commandstats")
        return int(stats.get("cmdstat_mget", {}).get("calls", 0))

    before = gets()
    for _ in range(3):
        setup.reader.poll()
    assert gets() == before
    # A heartbeat that announces the same digest renews the belief in it without a fetch.
    setup.now_s[0] += 5
    redis_server.client.hset(
        contract.node_key("default", "a"), mapping={"sequence": state.sequence + 9}
    )
    setup.reader.poll()
    assert gets() == before
    assert setup.target.table is not None
    assert setup.target.table.residency_heard_s[0] == setup.now_s[0]
    publisher.heartbeat("b", {USER: 16}, sequence=50)
    setup.reader.poll()
    assert gets() == before + 1
    assert setup.holders() == {"a": 320, "b": 16}


def test_age_counts_from_the_first_sight_of_a_sequence(setup: Setup, publisher: Publisher) -> None:
    for skew_ms in (0, 3_600_000):
        publisher.heartbeat("a", {}, heartbeat_unix_ms=int(time.time() * 1000) + skew_ms)
        setup.now_s[0] += 1
        heard_s = setup.now_s[0]
        setup.reader.poll()
        setup.now_s[0] += 3
        setup.reader.poll()
        assert setup.target.table is not None
        assert setup.target.table.heard_s[0] == pytest.approx(heard_s, abs=1.0)


def test_old_words_found_at_start_are_as_old_as_they_say(
    setup: Setup, publisher: Publisher
) -> None:
    publisher.heartbeat("a", {}, heartbeat_unix_ms=int(time.time() * 1000) - 20_000)
    setup.reader.poll()
    assert setup.target.table is not None
    assert setup.target.table.heard_s[0] == pytest.approx(80.0, abs=2.0)


def test_nodes_that_are_no_backends_are_left_alone(setup: Setup, publisher: Publisher) -> None:
    for name in ("a", "stranger", "strange\r\nname"):
        publisher.heartbeat("a" if name == "a" else "other", {USER: 16})
    publisher._client.zadd(contract.nodes_key("default"), {b"\xff\xfe": time.time() * 1000})
    setup.reader.poll()
    assert setup.holders() == {"a": 16}
    assert setup.metrics.unmatched_nodes._value.get() == 2
    assert setup.rejected() == {}


def test_dead_nodes_and_other_namespaces_are_not_read(
    setup: Setup, publisher: Publisher, redis_server: RedisProcess
) -> None:
    Publisher(redis_server.client, "other").heartbeat("a", {USER: 16})
    publisher.heartbeat("b", {USER: 16}, heartbeat_unix_ms=int(time.time() * 1000) - 3_600_000)
    setup.reader.poll()
    assert setup.target.table is None


def test_an_expired_node_keeps_its_last_words_and_they_age(
    setup: Setup, publisher: Publisher, redis_server: RedisProcess
) -> None:
    publisher.heartbeat("a", {USER: 320})
    publisher.heartbeat("b", {})
    setup.reader.poll()
    redis_server.client.delete(contract.node_key("default", "a"))
    setup.now_s[0] += 4
    publisher.heartbeat("b", {}, sequence=9)
    setup.reader.poll()
    assert setup.holders() == {"a": 320}
    table = setup.target.table
    assert table is not None
    trust = table.residency_trust(setup.now_s[0])
    assert trust[0] < 1 == trust[1]


def corrupt(client: Any, name: str, how: str) -> None:
    state, blob = contract.node_key("default", name), contract.digest_key_name("default", name)
    whole = client.get(blob)
    client.hset(state, "sequence", 1000)
    client.hset(state, "digest_sequence", 1000)
    if how == "truncated":
        client.set(blob, whole[:-1])
    elif how == "crc":
        client.set(blob, whole[:-1] + bytes([whole[-1] ^ 1]))
    elif how == "foreign":
        client.set(blob, b"\x00" * 100)
    elif how == "missing":
        client.delete(blob)
    elif how == "stale":
        pass
    elif how == "mismatch":
        client.set(blob, make_digest({USER: 999}, sequence=1000))
    elif how == "too_large":
        client.set(blob, whole + b"\x00" * contract.MAX_DIGEST_BYTES)
    elif how == "schema":
        client.hset(state, "schema", 99)
    elif how == "state":
        client.hset(state, "queue_ms", "nan")
    elif how == "other_node":
        client.hset(state, "name", "b")
    elif how == "not_a_hash":
        client.delete(state)
        client.set(state, "x")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated", "truncated"),
        ("crc", "crc"),
        ("foreign", "foreign"),
        ("missing", "missing"),
        ("stale", "stale"),
        ("mismatch", "mismatch"),
        ("too_large", "too_large"),
        ("schema", "schema"),
        ("state", "state"),
        ("other_node", "foreign"),
        ("not_a_hash", "state"),
    ],
)
def test_bad_words_are_counted_and_the_last_good_ones_stay(
    setup: Setup, publisher: Publisher, redis_server: RedisProcess, how: str, reason: str
) -> None:
    publisher.heartbeat("a", {USER: 320})
    publisher.heartbeat("b", {USER: 16})
    setup.reader.poll()
    corrupt(redis_server.client, "a", how)
    setup.now_s[0] += 1
    publisher.heartbeat("b", {USER: 48})
    assert setup.reader.poll(), "Redis itself is well"
    assert setup.rejected() == {reason: 1}
    assert setup.holders() == {"a": 320, "b": 48}
    redis_server.client.delete(contract.node_key("default", "a"))
    publisher.heartbeat("a", {USER: 640}, sequence=2000)
    setup.reader.poll()
    assert setup.holders() == {"a": 640, "b": 48}


def test_an_older_heartbeat_is_stale_and_a_new_boot_starts_empty(
    setup: Setup, publisher: Publisher, redis_server: RedisProcess
) -> None:
    publisher.heartbeat("a", {USER: 320}, sequence=10)
    setup.reader.poll()
    publisher.heartbeat("a", {USER: 16}, sequence=9)
    setup.reader.poll()
    assert setup.rejected() == {"stale": 1}
    assert setup.holders() == {"a": 320}
    publisher.heartbeat("a", {5: 16}, sequence=1, boot_epoch=8)
    redis_server.client.delete(contract.digest_key_name("default", "a"))
    setup.reader.poll()
    assert setup.holders() == {}, "the server started anew: what it held is gone"
    publisher.heartbeat("a", {5: 16}, sequence=2, boot_epoch=8)
    setup.reader.poll()
    assert setup.holders(5) == {"a": 16}


def test_a_node_that_counts_from_a_lower_number_is_heard_again_later(
    setup: Setup, publisher: Publisher
) -> None:
    publisher.heartbeat("a", {USER: 320}, sequence=1000)
    setup.reader.poll()
    publisher.heartbeat("a", {USER: 16}, sequence=5)
    setup.now_s[0] += 29
    setup.reader.poll()
    assert setup.holders() == {"a": 320}
    setup.now_s[0] += 2
    setup.reader.poll()
    assert setup.holders() == {"a": 16}
    publisher.heartbeat("a", {USER: 32}, sequence=6)
    setup.reader.poll()
    assert setup.holders() == {"a": 32}


def test_a_digest_newer_than_the_state_is_taken(setup: Setup, publisher: Publisher) -> None:
    """State and digest are read one after the other; a heartbeat may come in between."""
    publisher.heartbeat("a", {USER: 320})
    publisher._client.set(
        contract.digest_key_name("default", "a"), make_digest({USER: 640}, sequence=2)
    )
    setup.reader.poll()
    assert setup.holders() == {"a": 640}
    assert setup.rejected() == {}


def test_redis_away_and_back(
    setup: Setup, publisher: Publisher, redis_server: RedisProcess
) -> None:
    publisher.heartbeat("a", {USER: 320})
    assert setup.reader.poll()
    offers = setup.target.offers
    redis_server.kill()
    for _ in range(3):
        assert not setup.reader.poll()
    assert setup.metrics.store_up._value.get() == 0
    assert setup.target.offers == offers
    redis_server.start()
    publisher.heartbeat("a", {USER: 640})
    assert setup.reader.poll()
    assert setup.metrics.store_up._value.get() == 1
    assert setup.holders() == {"a": 640}


def test_a_redis_that_speaks_nonsense_is_survived(setup: Setup) -> None:
    import socket
    import threading

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def speak() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                peer.sendall(b"*-7\r\n$99999999999\r\nHTTP/1.1 200 OK\r\n\r\n" * 10)
                peer.close()

        threading.Thread(target=speak, daemon=True).start()
        strange = make_setup(f"redis://127.0.0.1:{listener.getsockname()[1]}", redis_timeout_ms=200)
        for _ in range(3):
            assert not strange.reader.poll()
        listener.shutdown(socket.SHUT_RDWR)
    assert strange.target.table is None


@settings(max_examples=150)
@given(data=st.data())
def test_any_blob_is_a_digest_or_rejected(data: st.DataObject) -> None:
    whole = make_digest({user: 16 * user for user in range(1, 40)}, sequence=3)
    state = node_state("a", digest_sequence=3, digest_crc=contract.digest_crc(whole))
    blob = data.draw(
        st.one_of(
            st.none(),
            st.binary(max_size=300),
            st.builds(
                lambda at, value, cut: (
                    whole[: at % len(whole)] + bytes([value]) + whole[at % len(whole) + 1 :]
                )[: cut or None],
                st.integers(0, 10_000),
                st.integers(0, 255),
                st.integers(0, len(whole)),
            ),
        )
    )
    if blob == whole:
        residency = accept_digest(state, blob, None)
        assert residency.tokens.tolist() == [16 * user for user in range(1, 40)]
        return
    with pytest.raises(Rejected) as caught:
        accept_digest(state, blob, None)
    assert caught.value.reason in {"missing", *map(str, contract.DigestReason)}


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]),
            st.dictionaries(
                st.sampled_from([name.encode() for name in contract.NodeState._fields]),
                st.one_of(st.binary(max_size=12), st.sampled_from([b"7", b"-1", b"1e999", b"inf"])),
                max_size=4,
            ),
            st.none() | st.binary(max_size=60),
        ),
        max_size=12,
    )
)
def test_any_sequence_of_words_is_survived(words: list[Any]) -> None:
    reasons: list[str] = []
    collector = Collector(lambda name, reason, message: reasons.append(reason))
    for turn, (name, changes, blob) in enumerate(words):
        good = contract.node_to_hash(node_state(name, sequence=turn))
        fields = {key.encode(): str(value).encode() for key, value in good.items()} | changes
        wanted = collector.states({name: fields}, float(turn), 0)
        collector.digests(dict.fromkeys(wanted, blob))
    for name, view in collector.views.items():
        assert view.state.name == name
        assert view.residency is None
    assert len(collector.views) <= 2
