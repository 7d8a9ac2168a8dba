"""The decision alone: from every state a crash may leave, the way to a served, trusted pair."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pytest
from hbm_operator.certificates.issue import Pair, issue
from hbm_operator.certificates.rotation import Held, Step, View, bundle, next_step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NAMES = ("hbm-webhook.hbm-system.svc", "10.1.2.3")
LIFETIME_S = 900.0
START = datetime(2026, 11, 21, tzinfo=UTC)


def _pair(now: datetime = START, names: tuple[str, ...] = NAMES) -> Pair:
    return issue(names, LIFETIME_S, now)


def _view(published: bytes, now: datetime = START, **changes: object) -> View:
    view = View(
        published=(published, published),
        settled=True,
        all_serve_current=None,
        now=now,
        names=NAMES,
        lifetime_s=LIFETIME_S,
    )
    return replace(view, **changes)  # type: ignore[arg-type]


def test_a_served_and_trusted_pair_is_left_alone() -> None:
    pair = _pair()
    view = _view(bundle([pair.authority], START))
    assert next_step(Held(pair), view) is Step.NONE
    almost = replace(view, now=START + timedelta(seconds=LIFETIME_S * 2 / 3 - 1))
    assert next_step(Held(pair), almost) is Step.NONE
    due = replace(view, now=START + timedelta(seconds=LIFETIME_S * 2 / 3 + 1))
    assert next_step(Held(pair), due) is Step.STAGE


def test_a_certificate_of_five_minutes_leaves_a_kubelet_time_to_show_the_next_one() -> None:
    pair = issue(NAMES, 300.0, START)
    view = _view(bundle([pair.authority], START), lifetime_s=300.0)
    assert next_step(Held(pair), replace(view, now=START + timedelta(seconds=149))) is Step.NONE
    assert next_step(Held(pair), replace(view, now=START + timedelta(seconds=151))) is Step.STAGE


@pytest.mark.parametrize(
    "pair",
    [
        Pair(b"", b"", b""),
        Pair(b"x", b"y", b"z"),
        replace(_pair(), key=_pair().key),
        replace(_pair(), authority=_pair().authority),
        _pair(names=("another.name.svc",)),
        _pair(now=START - timedelta(seconds=LIFETIME_S + 1)),
    ],
    ids=["empty", "garbage", "other key", "other authority", "other name", "expired"],
)
def test_what_cannot_serve_is_replaced(pair: Pair) -> None:
    good = _pair()
    published = bundle([good.authority], START)
    assert next_step(Held(pair), _view(published)) is Step.STAGE
    assert next_step(Held(good, staged=pair), _view(published)) is Step.STAGE
    # What replicas may still serve stays trusted, although the Secret no longer says what it is.
    assert good.authority.strip() in Held(pair, staged=_pair()).wanted_bundle(published, START)


def test_no_secret_and_a_lost_bundle_are_made_again() -> None:
    pair = _pair()
    assert next_step(None, _view(b"")) is Step.CREATE
    assert next_step(Held(pair), _view(b"")) is Step.PUBLISH
    half = replace(_view(b""), published=(bundle([pair.authority], START), b""))
    assert next_step(Held(pair), half) is Step.PUBLISH


def test_the_old_authority_goes_only_when_all_serve_the_new_pair() -> None:
    old, new = _pair(), _pair()
    held = Held(old, staged=new).promoted(START)
    both = held.wanted_bundle(b"", START)
    assert bundle([old.authority, new.authority], START) == both
    assert next_step(held, _view(both)) is Step.NONE
    assert next_step(held, _view(both, all_serve_current=False)) is Step.NONE
    assert next_step(held, _view(both, all_serve_current=True)) is Step.FORGET
    assert next_step(Held(new), _view(both, all_serve_current=False)) is Step.NONE
    assert next_step(Held(new), _view(both, all_serve_current=True)) is Step.FORGET


def test_secret_survives_its_own_writing() -> None:
    held = Held(_pair(), _pair(), bundle([_pair().authority, _pair().authority], START))
    data = held.to_data()
    assert Held.of({key: value for key, value in data.items() if value}) == held
    assert Held.of({"tls.crt": "no base64!"}) == Held(Pair(b"", b"", b""))
    emptied = Held(_pair()).to_data()
    assert {key for key, value in emptied.items() if value is None} == {
        "next-tls.crt",
        "next-tls.key",
        "next-ca.crt",
        "previous-ca.crt",
    }


# -- any order of steps, crashes and late replicas ------------------------------------------------


@dataclass
class _World:
    """Secret, bundle and replicas; replicas take the Secret over whenever they happen to."""

    now: datetime = START
    held: Held | None = None
    published: bytes = b""
    settled_by: int = 0
    serving: list[Pair] = field(default_factory=list)

    def keep(self, *, fresh_keeper: bool) -> Step:
        if fresh_keeper:
            self.settled_by = 0  # it has seen nothing yet
        current = self.held.current if self.held else None
        view = _view(
            self.published,
            self.now,
            settled=self.settled_by > 0,
            all_serve_current=bool(self.serving) and all(one == current for one in self.serving),
        )
        step = next_step(self.held, view)
        if self.held is None:
            self.held = Held(_pair(self.now))
        elif step is Step.STAGE:
            self.held = replace(self.held, staged=_pair(self.now))
        elif step is Step.PUBLISH:
            self._publish(self.held.wanted_bundle(self.published, self.now))
        elif step is Step.PROMOTE:
            self.held = self.held.promoted(self.now)
        elif step is Step.FORGET and self.held.previous:
            self.held = replace(self.held, previous=b"")
        elif step is Step.FORGET:
            self._publish(bundle([self.held.current.authority], self.now))
        else:
            self.settled_by += 1
        return step

    def _publish(self, wanted: bytes) -> None:
        self.published, self.settled_by = wanted, 0

    def reload(self, replica: int) -> None:
        if self.held is None:
            return
        while len(self.serving) <= replica:
            self.serving.append(self.held.current)
        self.serving[replica] = self.held.current


events = st.lists(
    st.sampled_from(["keep", "keep", "keep", "restarted keep", "replica 0", "replica 1", "time"]),
    max_size=60,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)
@given(events)
def test_whatever_a_replica_serves_is_trusted_in_any_order_of_events(order: list[str]) -> None:
    world = _World()
    while world.keep(fresh_keeper=False) is not Step.NONE:
        pass
    for replica in (0, 1):
        world.reload(replica)
    for event in order:
        if event.endswith("keep"):
            world.keep(fresh_keeper=event != "keep")
        elif event.startswith("replica"):
            world.reload(int(event[-1]))
        else:
            world.now += timedelta(seconds=LIFETIME_S / 12)
        for pair in world.serving:
            if pair.usable_until(NAMES, world.now):
                assert pair.authority in world.published, (event, order)
    # Left alone, it comes to rest: one pair, one authority, and everybody serves it.
    for _ in range(20):
        world.keep(fresh_keeper=False)
        world.reload(0)
        world.reload(1)
    assert world.held is not None
    assert world.held.staged is None
    assert world.published == bundle([world.held.current.authority], world.now)
    assert world.held.current.usable_until(NAMES, world.now)
