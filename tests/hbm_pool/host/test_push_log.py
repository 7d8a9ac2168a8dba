"""Readers and pushes in every order: who gets which value."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hbm_pool.host.push_log import PushLog


def keys(*values: int) -> npt.NDArray[np.int64]:
    return np.array(values, np.int64)


def rows(*values: int) -> npt.NDArray[np.uint8]:
    return np.array([[value, value] for value in values], np.uint8)


def test_reader_takes_over_a_push_that_ran_beside_it() -> None:
    log = PushLog()
    ticket = log.begin_read()
    push = log.begin_push(0, keys(3, 7), rows(30, 70))
    read = rows(1, 2, 3)
    assert log.patch(ticket, 0, keys(7, 5, 3), read).patched == 2
    assert read.tolist() == [[70, 70], [2, 2], [30, 30]]
    log.end_push(push)
    again = rows(1)
    assert log.patch(ticket, 0, keys(3), again).patched == 1
    log.end_read(ticket)
    assert log.pending == 0


def test_reader_that_starts_after_a_push_trusts_the_store() -> None:
    log = PushLog()
    old = log.begin_read()
    log.end_push(log.begin_push(0, keys(3), rows(30)))
    new = log.begin_read()
    read = rows(9)
    assert log.patch(new, 0, keys(3), read).patched == 0
    assert log.patch(old, 0, keys(3), read).patched == 1


def test_reader_that_starts_beside_a_push_is_patched() -> None:
    log = PushLog()
    push = log.begin_push(0, keys(3), rows(30))
    ticket = log.begin_read()
    log.end_push(push)
    read = rows(9)
    assert log.patch(ticket, 0, keys(3), read).patched == 1


def test_newest_of_several_pushes_wins() -> None:
    log = PushLog()
    ticket = log.begin_read()
    for value in (1, 2, 3):
        log.end_push(log.begin_push(0, keys(5), rows(value)))
    read = rows(0)
    log.patch(ticket, 0, keys(5), read)
    assert read.tolist() == [[3, 3]]


def test_other_classes_are_left_alone() -> None:
    log = PushLog()
    ticket = log.begin_read()
    log.begin_push(1, keys(5), rows(50))
    read = rows(0)
    assert log.patch(ticket, 0, keys(5), read).patched == 0


def test_rows_of_a_failed_push_are_read_again() -> None:
    log = PushLog()
    ticket = log.begin_read()
    log.end_push(log.begin_push(0, keys(4, 5), rows(40, 50)), failed=True)
    patch = log.patch(ticket, 0, keys(5, 6), rows(0, 0))
    assert patch.suspect.tolist() == [0]
    log.renew_read(ticket)
    assert log.patch(ticket, 0, keys(5), rows(0)).suspect.size == 0
    log.end_read(ticket)
    assert log.pending == 0


def test_good_push_after_a_failed_one_settles_the_row() -> None:
    log = PushLog()
    ticket = log.begin_read()
    log.end_push(log.begin_push(0, keys(5), rows(50)), failed=True)
    log.end_push(log.begin_push(0, keys(5), rows(51)))
    read = rows(0)
    patch = log.patch(ticket, 0, keys(5), read)
    assert patch.suspect.size == 0
    assert read.tolist() == [[51, 51]]


def test_log_stays_short() -> None:
    log = PushLog()
    for value in range(100):
        log.end_push(log.begin_push(0, keys(value), rows(1)))
    assert log.pending == 0
    ticket = log.begin_read()
    for value in range(100):
        log.end_push(log.begin_push(0, keys(value), rows(1)))
    assert log.pending == 100
    log.end_read(ticket)
    assert log.pending == 0
