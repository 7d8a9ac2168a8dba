"""Prints what an extra of pyproject.toml needs from outside, one requirement per line.

    python3 images/requirements.py sidecar < pyproject.toml

Extras may name each other (`hbm-partition[pool,kube]`). An image installs these before the code is
copied, so that a change of the code does not install them anew.
"""

import re
import sys
import tomllib

OURS = re.compile(r"hbm-partition\[([\w,-]+)\]")


def requirements(project: dict[str, object], extras: list[str]) -> list[str]:
    """The base dependencies and those of the extras, sorted, each once."""
    base, by_extra = project["dependencies"], project["optional-dependencies"]
    assert isinstance(base, list)
    assert isinstance(by_extra, dict)
    found = set(base)
    seen: set[str] = set()
    waiting = list(extras)
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in by_extra[extra]:
            ours = OURS.fullmatch(requirement)
            if ours:
                waiting += ours[1].split(",")
            else:
                found.add(requirement)
    return sorted(found)


if __name__ == "__main__":
    with sys.stdin.buffer as file:
        table = tomllib.load(file)["project"]
    print("\n".join(requirements(table, ",".join(sys.argv[1:]).split(","))))
