"""Everything the embedding cache can be asked, in any order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hbm_pool.errors import RowStoreError
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.hbm_pool.device.emb_world import EmbWorld


class Interleavings(RuleBasedStateMachine):
    """Everything the cache can be asked, in any order; checked after each step."""

    index = "host"

    @initialize(seed=st.integers(0, 999), extents=st.integers(0, 30))
    def start(self, seed: int, extents: int) -> None:
        self.world = EmbWorld(seed, index=self.index)
        self.world.grow(extents)
        self.promised = 0

    @rule(count=st.integers(1, 120), skew=st.sampled_from([0.4, 1.0, 2.0]))
    def gather(self, count: int, skew: float) -> None:
        self.world.gather_and_check(self.world.batch(count, skew))

    @rule(count=st.integers(1, 60))
    def prefetch(self, count: int) -> None:
        ids = self.world.batch(count)
        self.world.cache.prefetch(ids)

    @rule(count=st.integers(0, 8))
    def grow(self, count: int) -> None:
        self.world.grow(min(count, len(self.world.free)))

    @rule(count=st.integers(0, 10))
    def plan_shrink(self, count: int) -> None:
        held = self.world.cache.num_extents
        planned = self.world.cache.plan_shrink(count)
        assert planned == min(count, held - self.promised)
        self.promised += planned

    @rule(budget_us=st.sampled_from([0.0, 200.0, 1e6]))
    def shrink_step(self, budget_us: float) -> None:
        released = self.world.cache.shrink_step(budget_us)
        self.promised -= released.size
        assert self.promised >= 0
        if budget_us == 1e6:
            assert self.promised == 0
        self.world.give_back(released)

    @rule()
    def cancel_shrink(self) -> None:
        assert self.world.cache.cancel_shrink() == self.promised
        self.promised = 0

    @rule(count=st.integers(0, 12))
    def drop(self, count: int) -> None:
        held = self.world.cache.num_extents
        released = self.world.cache.drop(count)
        assert released.size == min(count, held)
        self.promised = max(0, self.promised - released.size)
        self.world.give_back(released)

    @rule()
    def rebalance(self) -> None:
        held = self.world.cache.num_extents
        self.world.cache.rebalance(500.0)
        assert self.world.cache.num_extents == held

    @rule()
    def reset(self) -> None:
        held = self.world.cache.num_extents
        self.world.cache.reset()
        self.promised = 0
        assert self.world.cache.num_extents == held
        assert all(self.world.cache.resident_ids(name).size == 0 for name in self.world.values)

    @rule()
    def refill(self) -> None:
        evicted = self.world.cache.counters().evictions
        for number, keys in self.world.cache.refill_candidates(40):
            self.world.cache.refill(number, keys)
        assert self.world.cache.counters().evictions == evicted

    @rule(name=st.sampled_from(["item", "shop", "text", "tiny"]), count=st.integers(0, 40))
    def push_rows(self, name: str, count: int) -> None:
        world = self.world
        ids = world.draw(name, count)
        new = torch.from_numpy(world.rng.integers(-99, 99, (count, world.values[name].shape[1])))
        new = new.to(world.values[name].dtype)
        before = world.cache.row_epoch
        assert world.cache.push_rows(name, ids, new) == before + (count > 0)
        for place, row in enumerate(ids.tolist()):
            world.values[name][row] = new[place]

    @rule(name=st.sampled_from(["item", "text"]))
    def failed_read(self, name: str) -> None:
        world = self.world
        ids = world.batch(60, 0.4)
        world.stores[name].fail_reads = True
        misses = world.cache.counters().misses
        problem = ""
        try:
            world.cache.gather(ids, world.buffers(ids))
        except RowStoreError as error:
            problem = str(error)
        world.stores[name].fail_reads = False
        if problem:
            assert "the disk is gone" in problem
            assert f"'{name}'" in problem
            assert world.cache.counters().misses == misses

    @rule(count=st.integers(2, 20))
    def failed_push(self, count: int) -> None:
        world = self.world
        ids = np.unique(world.draw("item", count).numpy())
        new = torch.full((ids.size, 16), 55.0)
        world.stores["item"].fail_writes = True
        with pytest.raises(RowStoreError, match="the disk is full"):
            world.cache.push_rows("item", ids, new)
        world.stores["item"].fail_writes = False
        world.values["item"][ids[: ids.size // 2]] = 55.0  # what got through
        resident = set(world.cache.resident_ids("item").tolist())
        assert not resident & set(ids.tolist())

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "world"):
            self.world.check()


class InterleavingsOnDevice(Interleavings):
    index = "device"


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(
    max_examples=50, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestInterleavingsOnDevice = InterleavingsOnDevice.TestCase
TestInterleavingsOnDevice.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
