"""The difference of two JSON values as a JSON patch (RFC 6902), no larger than it must be.

A patch that replaces a whole list would overwrite what other webhooks did to its other entries, so
lists differ by single entries: what is inserted or taken out between the common beginning and the
common end.
"""

from __future__ import annotations

from typing import Any

Operation = dict[str, Any]


def json_patch(before: Any, after: Any, path: str = "") -> list[Operation]:
    """Operations that turn `before` into `after`; empty if they are equal.

    Args:
        before: any JSON value.
        after: any JSON value.
        path: JSON pointer to both.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        return _objects(before, after, path)
    if isinstance(before, list) and isinstance(after, list):
        return _lists(before, after, path)
    # In Python True equals 1 and 1.0 equals 1; in a pod they are different things.
    if before == after and type(before) is type(after):
        return []
    return [{"op": "replace", "path": path, "value": after}]


def _objects(before: dict[str, Any], after: dict[str, Any], path: str) -> list[Operation]:
    operations: list[Operation] = [
        {"op": "remove", "path": f"{path}/{_escaped(key)}"} for key in before if key not in after
    ]
    for key, value in after.items():
        place = f"{path}/{_escaped(key)}"
        if key in before:
            operations += json_patch(before[key], value, place)
        else:
            operations.append({"op": "add", "path": place, "value": value})
    return operations


def _lists(before: list[Any], after: list[Any], path: str) -> list[Operation]:
    shorter = min(len(before), len(after))
    start = 0
    while start < shorter and _same(before[start], after[start]):
        start += 1
    end = 0
    while end < shorter - start and _same(before[-1 - end], after[-1 - end]):
        end += 1
    old, new = before[start : len(before) - end], after[start : len(after) - end]
    paired = min(len(old), len(new))
    operations: list[Operation] = []
    for index in range(paired):
        operations += json_patch(old[index], new[index], f"{path}/{start + index}")
    for index in range(paired, len(new)):
        operations.append({"op": "add", "path": f"{path}/{start + index}", "value": new[index]})
    for index in reversed(range(paired, len(old))):
        operations.append({"op": "remove", "path": f"{path}/{start + index}"})
    return operations


def _same(one: Any, other: Any) -> bool:
    return not json_patch(one, other)


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
