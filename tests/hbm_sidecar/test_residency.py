"""The mirror equals the server's residents at its own sequence, whatever the ring loses."""

import numpy as np
from hbm_pool.contracts.records import (
    ResidencyEvent,
    ResidencySnapshot,
    UserCached,
    UserEvicted,
)
from hbm_sidecar.residency import ResidencyMirror
from hypothesis import given, settings
from hypothesis import strategies as st

BOOT = 7


def snapshot_of(state: dict[int, int], sequence: int, boot: int = BOOT) -> ResidencySnapshot:
    return ResidencySnapshot(
        boot_epoch=boot,
        sequence=sequence,
        users=np.array(list(state), dtype=np.int64),
        tokens=np.array(list(state.values()), dtype=np.uint32),
        shard_rows=np.array([3, 1], dtype=np.uint32),
    )


def content(mirror: ResidencyMirror) -> dict[int, int]:
    view = mirror.view()
    return dict(zip(view.users.tolist(), view.tokens.tolist(), strict=True))


changes = st.lists(
    st.tuples(st.integers(-3, 3), st.integers(0, 50)), max_size=6
)  # user, tokens; 0: evicted
steps = st.lists(
    st.one_of(
        st.tuples(st.just("events"), changes),
        st.tuples(st.just("lost"), changes),
        st.tuples(st.just("lost silently"), changes),
        st.tuples(st.just("snapshot now"), st.just([])),
        st.tuples(st.just("old snapshot"), st.integers(0, 30).map(lambda n: [(n, 0)])),
    ),
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(steps, st.integers(0, 4))
def test_exact_means_equal_to_the_server(steps: list, lag: int) -> None:
    mirror = ResidencyMirror()
    history: list[dict[int, int]] = [{}]  # state by sequence
    mirror.restart(BOOT, newest=0)

    def happen(todo: list[tuple[int, int]]) -> list[ResidencyEvent]:
        events: list[ResidencyEvent] = []
        for user, tokens in todo:
            state = dict(history[-1])
            sequence = len(history)
            if tokens:
                state[user] = tokens
                events.append(UserCached(sequence, user, tokens))
            else:
                state.pop(user, None)
                events.append(UserEvicted(sequence, user))
            history.append(state)
        return events

    for kind, todo in steps:
        newest = max(0, len(history) - 1 - lag)  # telemetry is older than the ring
        if kind == "events":
            mirror.feed(happen(todo), gap=False, newest=newest)
        elif kind == "lost":
            events = happen(todo)
            mirror.feed(events[: len(events) // 2], gap=True, newest=newest)
        elif kind == "lost silently":
            happen(todo)
            mirror.feed([], gap=False, newest=newest)
        elif kind == "snapshot now":
            mirror.take(snapshot_of(history[-1], len(history) - 1))
        else:
            sequence = min(todo[0][0], len(history) - 1)
            mirror.take(snapshot_of(history[sequence], sequence))
        if mirror.exact:
            assert content(mirror) == history[mirror.sequence]

    newest = len(history) - 1
    mirror.feed([], gap=False, newest=newest)
    mirror.take(snapshot_of(history[-1], newest))
    assert mirror.exact
    assert content(mirror) == history[-1]


def test_snapshot_of_another_boot_is_not_taken() -> None:
    mirror = ResidencyMirror()
    mirror.restart(BOOT, newest=0)
    assert not mirror.take(snapshot_of({1: 8}, 5, boot=BOOT + 1))
    assert content(mirror) == {}


def test_restart_forgets_the_residents_of_the_server_before() -> None:
    mirror = ResidencyMirror()
    mirror.restart(BOOT, newest=0)
    mirror.take(snapshot_of({1: 8, 2: 16}, 5))
    mirror.restart(BOOT + 1, newest=0)
    assert content(mirror) == {}
    assert not mirror.exact


def test_coverage_is_refreshed_without_touching_users() -> None:
    mirror = ResidencyMirror()
    mirror.restart(BOOT, newest=0)
    mirror.take(snapshot_of({1: 8}, 1))
    mirror.feed([UserCached(2, 2, 16)], gap=False, newest=2)
    fresh = snapshot_of({1: 8}, 1)._replace(shard_rows=np.array([9], dtype=np.uint32))
    assert mirror.take(fresh)
    assert content(mirror) == {1: 8, 2: 16}
    assert mirror.view().shard_rows.tolist() == [9]
