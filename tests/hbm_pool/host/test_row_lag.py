"""How far KV is behind pushed rows, on a clock of our own."""

from hbm_pool.host.row_lag import RowLag
from hypothesis import given, settings
from hypothesis import strategies as st


class _Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lag_counts_from_the_first_push_after_the_kv() -> None:
    time = _Time()
    rows = RowLag(300.0, time)
    assert rows.lag_s(rows.epoch) == 0.0
    before = rows.epoch
    time.now += 5
    assert rows.push() == before + 1
    between = rows.epoch
    time.now += 10
    rows.push()
    time.now += 1
    assert rows.lag_s(before) == 11.0
    assert rows.lag_s(between) == 1.0
    assert rows.lag_s(rows.epoch) == 0.0


def test_strict_allows_no_lag_at_all() -> None:
    time = _Time()
    rows = RowLag(0.0, time)
    old = rows.epoch
    rows.push()
    assert rows.lags_too_much(old)
    assert not rows.lags_too_much(rows.epoch)


@settings(max_examples=100, deadline=None)
@given(
    gaps=st.lists(st.floats(0.0, 40.0), min_size=1, max_size=60),
    max_lag_s=st.sampled_from([0.0, 1.0, 30.0, 300.0]),
    data=st.data(),
)
def test_decides_as_if_every_push_was_remembered(
    gaps: list[float], max_lag_s: float, data: st.DataObject
) -> None:
    time = _Time()
    rows = RowLag(max_lag_s, time)
    pushed: list[float] = []
    for gap in gaps:
        time.now += gap
        rows.push()
        pushed.append(time.now)
    time.now += data.draw(st.floats(0.0, 40.0))
    for epoch in range(len(pushed)):
        lag = time.now - pushed[epoch]
        too_much = max_lag_s == 0.0 or lag > max_lag_s
        assert rows.lags_too_much(epoch) == too_much
        assert (epoch < rows.oldest_usable_epoch()) == too_much
        if not too_much:
            assert rows.lag_s(epoch) == lag
