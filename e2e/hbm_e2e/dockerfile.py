"""The stages of a Dockerfile, and those that one target needs.

buildah before 1.29 builds every stage above the target, wanted or not; one of ours is gigabytes.
"""

import re
from dataclasses import dataclass

from hbm_e2e.errors import HarnessError

_FROM = re.compile(r"^FROM\s+(?:--\S+\s+)*(?P<base>\S+)(?:\s+AS\s+(?P<name>\S+))?\s*$", re.I)
_COPY = re.compile(r"^(?:COPY|ADD|RUN)\b.*?--(?:from=|mount=\S*?from=)(?P<stage>[^\s,]+)", re.I)
_FROM_CONTEXT = re.compile(r"^(?:COPY|ADD)\s+(?!--from=)(?P<words>.+)$", re.I | re.M)


@dataclass(frozen=True)
class Stage:
    name: str
    needs: frozenset[str]
    """Bases and sources of copies: other stages and images alike."""
    text: str


def only(dockerfile: str, target: str) -> str:
    """The Dockerfile without the stages that `target` does not need; raises for no such stage."""
    head, stages = _split(dockerfile)
    by_name = {stage.name: stage for stage in stages}
    if target not in by_name:
        raise HarnessError(f"no target {target!r} (there are {', '.join(by_name)})")
    wanted: set[str] = set()
    open_ends = [target]
    while open_ends:
        name = open_ends.pop()
        if name in by_name and name not in wanted:
            wanted.add(name)
            open_ends += by_name[name].needs
    return head + "".join(stage.text for stage in stages if stage.name in wanted)


def sources(dockerfile: str) -> list[str]:
    """Files and folders that a Dockerfile copies out of its context, sorted, each once."""
    found: set[str] = set()
    for copy in _FROM_CONTEXT.finditer(dockerfile):
        *copied, _ = (word for word in copy["words"].split() if not word.startswith("--"))
        found.update(copied)
    return sorted(found)


def _split(dockerfile: str) -> tuple[str, list[Stage]]:
    head = ""
    stages: list[Stage] = []
    for line in dockerfile.splitlines(keepends=True):
        start = _FROM.match(line.strip())
        if start:
            name = start["name"] or str(len(stages))
            stages.append(Stage(name, frozenset({start["base"]}), line))
        elif stages:
            last = stages[-1]
            source = _COPY.match(line.strip())
            needs = last.needs | ({source["stage"]} if source else set())
            stages[-1] = Stage(last.name, needs, last.text + line)
        else:
            head += line
    return head, stages
