"""The wish: what is accepted, where it comes from, what survives."""

import json
import os
from pathlib import Path

import pytest
from hbm_sidecar.config import SidecarConfig
from hbm_sidecar.partition import (
    PARTITION_FILE,
    DeclaredPartition,
    LocalPartition,
    ModeName,
    Partition,
    PartitionInvalid,
    PartitionRefused,
    new_intent,
    read_partition,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"alpha_min": 0.6, "alpha_max": 0.4}, "alpha_max"),
        ({"alpha_min": -0.1}, "alpha_min"),
        ({"alpha_max": 1.5}, "alpha_max"),
        ({"mode": "fixed"}, "alpha_fixed"),
        ({"mode": "fixed", "alpha_fixed": 0.95}, "alpha_fixed"),
        ({"mode": "turbo"}, "mode"),
        ({"tick_ms": 1.0}, "tick_ms"),
        ({"refill_bytes_per_s": -1.0}, "refill_bytes_per_s"),
        ({"alpha_min": float("nan")}, "alpha_min"),
        ({"alfa_min": 0.2}, "alfa_min"),
    ],
)
def test_a_wrong_wish_names_the_field(fields: dict, named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Partition(**fields)
    assert caught.value.errors()[0]["loc"] == (named,)


def test_intent_carries_the_wish() -> None:
    record = new_intent()
    wish = Partition(mode="Fixed", alpha_fixed=0.3, tick_ms=100, slo_ms=20)
    wish.fill_intent(record, generation=4, monotonic_ns=99)
    assert (int(record["mode"]), float(record["alpha_fixed"])) == (3, 0.3)
    assert (int(record["generation"]), int(record["monotonic_ns"])) == (4, 99)
    assert int(record["policy_hash"]) == wish.policy_hash()
    assert wish.policy_hash() != Partition().policy_hash()


def test_what_was_put_survives_a_restart_and_can_be_forgotten(tmp_path: Path) -> None:
    started, wanted = Partition(), Partition(mode=ModeName.FIXED, alpha_fixed=0.25)
    LocalPartition(started, tmp_path).put(wanted)
    again = LocalPartition(started, tmp_path)
    assert again.current() == wanted
    again.reset()
    assert LocalPartition(started, tmp_path).current() == started


def test_a_damaged_kept_wish_leaves_the_flags_in_force(tmp_path: Path) -> None:
    (tmp_path / PARTITION_FILE).write_text('{"alpha_min": 0.9')
    source = LocalPartition(Partition(), tmp_path)
    assert source.current() == Partition()
    assert source.problem is not None
    assert PARTITION_FILE in source.problem


def test_a_bad_policy_file_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    good = Partition(alpha_min=0.2)
    path.write_text(good.model_dump_json())
    source = DeclaredPartition(Partition(), path)
    assert source.current() == good
    path.write_text('{"alpha_min": 2}')
    assert not source.poll()
    assert source.current() == good
    assert source.problem is not None
    assert "alpha_min" in source.problem
    newer = tmp_path / "newer"
    newer.write_text(json.dumps({"alpha_min": 0.3}))
    os.replace(newer, path)
    assert source.poll()
    assert source.current().alpha_min == 0.3
    assert source.problem is None


def test_a_declared_wish_may_come_later(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    source = DeclaredPartition(Partition(mode=ModeName.HOLD), path)
    assert source.current().mode is ModeName.HOLD
    path.write_text('{"mode": "auto"}')
    assert source.poll()
    assert source.current().mode is ModeName.AUTO


def test_a_declared_wish_refuses_change_and_names_its_owner(tmp_path: Path) -> None:
    source = DeclaredPartition(Partition(), tmp_path / "policy.json")
    with pytest.raises(PartitionRefused, match=r"policy\.json"):
        source.put(Partition())
    with pytest.raises(PartitionRefused, match=r"policy\.json"):
        source.reset()


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
            lambda inner: (
                st.lists(inner)
                | st.dictionaries(st.sampled_from(list(Partition.model_fields)) | st.text(), inner)
            ),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_any_file_is_a_partition_or_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_bytes(raw)
    try:
        found = read_partition(path)
    except PartitionInvalid as refused:
        text = str(refused)
    else:
        text = str(path)
        assert found.alpha_min <= found.alpha_max
    assert str(path) in text


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    path.write_bytes(b" " * (1 << 20))
    with pytest.raises(PartitionInvalid, match="larger"):
        read_partition(path)


def test_children_read_the_same_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SidecarConfig(
        run_dir=tmp_path,
        mode="fixed",
        alpha_fixed=0.3,
        redis_url="redis://:secret@localhost:6379/0",
        node_url="http://localhost:8000",
        ready_file=tmp_path / "ready",
        move_fraction=0.1 + 0.2,
    )
    for name, value in config.environment({"HBM_POLICY_FILE": "/elsewhere"}).items():
        monkeypatch.setenv(name, value)
    assert SidecarConfig() == config
    assert SidecarConfig().partition() == config.partition()
    assert SidecarConfig().policy().shield.move_fraction == 0.1 + 0.2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"node": "a b"}, "node"),
        ({"namespace": "x:y"}, "namespace"),
        ({"redis_url": "http://x"}, "redis_url"),
        ({"node_url": "localhost:80"}, "node_url"),
        ({"port": 70000}, "port"),
        ({"ttl_heartbeats": 2}, "ttl_heartbeats"),
        ({"run_dir": "/" + "x" * 120}, "run_dir"),
    ],
)
def test_a_wrong_setting_names_the_field(fields: dict, named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SidecarConfig(**fields)
    assert caught.value.errors()[0]["loc"] == (named,)


def test_a_secret_in_the_redis_url_is_not_repeated() -> None:
    with pytest.raises(ValidationError) as caught:
        SidecarConfig(redis_url="http://user:secret@x")
    assert "secret" not in caught.value.errors()[0]["msg"]
