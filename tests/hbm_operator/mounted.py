"""A Secret as the kubelet mounts it: all files change in one instant."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from hbm_operator.certificates import Pair


def mount(directory: Path, files: Mapping[str, bytes]) -> None:
    """Shows `files` in `directory`: through a link to a folder that is swapped atomically."""
    version = directory / f"..{secrets.token_hex(4)}"
    version.mkdir(parents=True)
    for name, content in files.items():
        (version / name).write_bytes(content)
    link = directory / "..data"
    fresh = directory / f"..{version.name}-link"
    fresh.symlink_to(version.name)
    os.replace(fresh, link)
    for name in files:
        shown = directory / name
        if not shown.is_symlink():
            shown.symlink_to(Path("..data") / name)


def mount_pair(directory: Path, pair: Pair, *, with_authority: bool = True) -> None:
    """As a Secret of type kubernetes.io/tls, with `ca.crt` where the issuer puts one."""
    files = {"tls.crt": pair.certificate, "tls.key": pair.key}
    mount(directory, files | ({"ca.crt": pair.authority} if with_authority else {}))
