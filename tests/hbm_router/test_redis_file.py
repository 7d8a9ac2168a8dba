"""The address of Redis in a file that comes late and changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
from hbm_pool.contracts.digest import node_key
from hbm_router.config import RouterSettings
from hbm_router.cost import CostTable
from hbm_router.metrics import RouterMetrics
from hbm_router.reader import SnapshotReader

from tests.hbm_router.published import Publisher, RedisProcess


class Target:
    """Takes the tables."""

    names = ("a",)

    def __init__(self) -> None:
        self.table: CostTable | None = None

    def offer(self, table: CostTable) -> None:
        self.table = table

    def queue_ms(self) -> float | None:
        return None if self.table is None else self.table.queue_ms.tolist()[0]


def test_it_comes_late_and_changes(tmp_path: Path, redis_server: RedisProcess) -> None:
    file = tmp_path / "url"
    settings = RouterSettings(backends="a=http://h:1", redis_url_file=file)
    target, metrics = Target(), RouterMetrics()
    reader = SnapshotReader(settings, target, metrics)

    def up() -> float | None:
        return metrics.registry.get_sample_value("hbm_router_store_up")

    # Nobody to ask is no failure.
    assert reader.poll()
    assert up() == 0
    file.write_text("this is no address")
    assert reader.poll()
    assert up() == 0
    publisher = Publisher(redis.Redis(port=redis_server.port))
    publisher.heartbeat("a", queue_ms=3.0)
    file.write_text(redis_server.url + "\n")
    assert reader.poll()
    assert (up(), target.queue_ms()) == (1, 3.0)
    # Another one, as after a new password: a node is known there by other words.
    other = redis.Redis(port=redis_server.port, db=1)
    publisher = Publisher(other)
    publisher.heartbeat("a", queue_ms=5.0, sequence=1000)
    file.write_text(redis_server.url.removesuffix("/0") + "/1")
    assert reader.poll()
    assert target.queue_ms() == 5.0
    # What is no address any more leaves the one that was.
    file.write_text("")
    publisher.heartbeat("a", queue_ms=6.0, sequence=2000)
    assert reader.poll()
    assert target.queue_ms() == 6.0
    assert other.exists(node_key("default", "a"))


def test_two_addresses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="redis_url and redis_url_file are both set"):
        RouterSettings(
            backends="a=http://h:1", redis_url="redis://h", redis_url_file=tmp_path / "url"
        )


def test_two_lists_of_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="backends and service are both set"):
        RouterSettings(backends="a=http://h:1", service="model")
