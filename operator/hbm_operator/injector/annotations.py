"""What a pod asks for by annotation, checked; and keys that nobody reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final, TypeVar

from hbm_operator import names
from hbm_operator.injector.settings import InjectionSettings
from hbm_operator.injector.skip import Skip, SkipReason
from hbm_operator.injector.stamp import TRANSPORT_SHM
from hbm_operator.quantity import parse_quantity

T = TypeVar("T")

_PREFIX: Final = f"{names.GROUP}/"
_IMAGE: Final = re.compile(r"[A-Za-z0-9][\w.:/@\[\]-]*")
_LOWEST_PORT, _HIGHEST_PORT = 1024, 65_535
_SHOWN: Final = 60
"""Characters of a value that a message repeats."""

_POD_LABELS: Final = frozenset({names.INJECT_LABEL, names.ROUTE_LABEL, *names.OUTPUT_LABELS})
_POD_ANNOTATIONS: Final = frozenset({*names.INPUT_ANNOTATIONS, *names.OUTPUT_ANNOTATIONS})


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """The settings of one pod's sidecar: the operator's, with the pod's annotations over them."""

    container: str | None
    """Container that serves the model, if the pod names it."""
    image: str
    cpu: str
    cpu_limit: str
    """Empty: none."""
    memory: str
    run_dir_size: str
    port: int
    native: bool
    ranks: int | None
    """Pairs of control-block files; None: not said."""

    @classmethod
    def of(cls, annotations: dict[str, str], settings: InjectionSettings) -> Overrides:
        """Reads the annotations of a pod.

        Raises:
            Skip: a value is wrong; the message names it and what to write.
        """

        def read(key: str, check: Callable[[str], T], default: T) -> T:
            if key not in annotations:
                return default
            try:
                return check(annotations[key].strip())
            except ValueError as error:
                raise Skip(SkipReason.INVALID_ANNOTATION, f"{key}: {error}") from error

        cpu = read(names.CPU, _amount, settings.cpu)
        cpu_limit = read(names.CPU_LIMIT, _amount, settings.cpu_limit)
        if cpu_limit and parse_quantity(cpu) > parse_quantity(cpu_limit):
            if names.CPU in annotations:
                raise Skip(
                    SkipReason.INVALID_ANNOTATION,
                    f"{names.CPU}: {cpu!r} is more than the limit {cpu_limit!r}; raise "
                    f"{names.CPU_LIMIT} or lower the request",
                )
            cpu = cpu_limit
        read(names.TRANSPORT, _transport, TRANSPORT_SHM)
        return cls(
            container=annotations.get(names.CONTAINER),
            image=read(names.IMAGE, _image, settings.image),
            cpu=cpu,
            cpu_limit=cpu_limit,
            memory=read(names.MEMORY, _amount, settings.memory),
            run_dir_size=read(names.RUN_DIR_SIZE, _amount, settings.run_dir_size),
            port=read(names.PORT, _port, settings.port),
            # A cluster without native sidecars does not get them by asking.
            native=read(names.NATIVE_SIDECAR, _truth, True) and settings.native,
            ranks=read(names.RANKS, _ranks, None),
        )


def _amount(value: str) -> str:
    if parse_quantity(value) <= 0:
        raise ValueError(f"{_shown(value)} is not more than 0; write for example 100m or 400Mi")
    return value


def _port(value: str) -> int:
    port = _whole(value)
    if port is None or not _LOWEST_PORT <= port <= _HIGHEST_PORT:
        raise ValueError(f"{_shown(value)} is no port from {_LOWEST_PORT} to {_HIGHEST_PORT}")
    return port


def _image(value: str) -> str:
    if not _IMAGE.fullmatch(value):
        raise ValueError(f"{_shown(value)} is no image; write NAME:TAG or NAME@DIGEST")
    return value


def _truth(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError(f'{_shown(value)} is neither "true" nor "false"')
    return value == "true"


def _transport(value: str) -> str:
    if value != TRANSPORT_SHM:
        raise ValueError(f'{_shown(value)} is no transport; the only one is "{TRANSPORT_SHM}"')
    return value


def _ranks(value: str) -> int | None:
    ranks = _whole(value)
    if not ranks:
        raise ValueError(f'{_shown(value)} is no number of ranks; write "1"')
    return ranks


def _whole(value: str) -> int | None:
    return int(value) if re.fullmatch(r"[0-9]{1,6}", value) else None


def _shown(value: str) -> str:
    return repr(value[:_SHOWN])


def key_warnings(metadata: dict[str, Any]) -> tuple[str, ...]:
    """A warning for each of our keys in a pod's metadata that nobody reads there."""
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    return tuple(
        [_label_warning(key) for key in labels if _unread(key, _POD_LABELS)]
        + [_annotation_warning(key) for key in annotations if _unread(key, _POD_ANNOTATIONS)]
    )


def _unread(key: str, known: frozenset[str]) -> bool:
    return key.startswith(_PREFIX) and key not in known


def _label_warning(key: str) -> str:
    if key in _POD_ANNOTATIONS:
        return f"label {key} is not read: write it as an annotation"
    if key == names.NAMESPACE_LABEL:
        return f"label {key} is for namespaces; on a pod write {names.INJECT_LABEL}"
    return f"label {key} is unknown; {_nearest(key, {names.INJECT_LABEL})}"


def _annotation_warning(key: str) -> str:
    if key in _POD_LABELS:
        return f"annotation {key} is not read: write it as a label"
    return f"annotation {key} is unknown; {_nearest(key, names.INPUT_ANNOTATIONS)}"


def _nearest(key: str, known: set[str] | frozenset[str]) -> str:
    near = get_close_matches(
        key.removeprefix(_PREFIX), [name.removeprefix(_PREFIX) for name in sorted(known)], n=1
    )
    if near:
        return f"did you mean {_PREFIX}{near[0]}?"
    return "known are " + ", ".join(sorted(name.removeprefix(_PREFIX) for name in known))
