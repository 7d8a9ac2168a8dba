"""Names of nodes and namespaces."""

import pytest
from hbm_pool.contracts.names import check_name


@pytest.mark.parametrize("name", ["a", "node-1", "A.b_c-9", "x" * 253, "0" * 36])
def test_a_name_is_itself(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "a b", "-a", "a-", ".a", "a.", "x:y", "a\n", "é", "x" * 254, "*"]
)
def test_any_other_text_is_refused_with_the_value(name: str) -> None:
    with pytest.raises(ValueError, match="is no name; use letters") as caught:
        check_name(name)
    assert repr(name[:60]) in str(caught.value)
