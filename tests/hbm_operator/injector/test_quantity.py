"""Quantities as the API server reads them."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hbm_operator.quantity import parse_quantity


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("100m", "0.1"),
        ("0.1", "0.1"),
        (2, "2"),
        (0.5, "0.5"),
        ("1Ki", "1024"),
        ("1k", "1000"),
        ("1.5Gi", "1610612736"),
        ("2e3", "2000"),
        ("2E3", "2000"),
        ("1E", "1000000000000000000"),
        ("5e-1", "0.5"),
        (".5", "0.5"),
        ("7.", "7"),
        ("-3u", "-0.000003"),
        ("12n", "0.000000012"),
    ],
)
def test_same_amount_however_it_is_written(text: str | int | float, number: str) -> None:
    assert parse_quantity(text) == Decimal(number)


@pytest.mark.parametrize(
    "text", ["", "1 Gi", "1gi", "Gi", "1GiB", "0x10", "1e", "nan", "٣", "9" * 65]
)
def test_no_quantity_is_refused_with_the_value(text: str) -> None:
    with pytest.raises(ValueError, match="is no quantity; write for example") as error:
        parse_quantity(text)
    assert repr(text[:64]) in str(error.value)
