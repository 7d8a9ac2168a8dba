"""Whether the cluster runs native sidecars (KEP-753: on by default from Kubernetes 1.29)."""

from __future__ import annotations

import re
from typing import Final

import aiohttp
import orjson
import structlog
from hbm_kube.client import KubeClient
from hbm_kube.config import KubeConfig
from hbm_kube.errors import KubeConfigError

from hbm_operator.webhook.settings import NativeSidecars

_FIRST: Final = (1, 29)
_TIMEOUT_S: Final = 5.0


async def native_sidecars(wish: NativeSidecars) -> bool:
    """What the settings say, or for `auto` what the API server's version means.

    A version that cannot be learnt counts as a new one: all that are supported today have them.
    """
    if wish is not NativeSidecars.AUTO:
        return wish is NativeSidecars.TRUE
    log = structlog.get_logger()
    try:
        async with KubeClient(KubeConfig.in_cluster()) as kube:
            timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
            async with kube.open("GET", "/version", None, timeout=timeout) as response:
                said = orjson.loads(await response.read())
        found = has_native_sidecars(said["major"], said["minor"])
    except (
        KubeConfigError,
        aiohttp.ClientError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:
        log.warning("version of Kubernetes unknown, native sidecars assumed", problem=str(error))
        return True
    log.info("version of Kubernetes", version=said.get("gitVersion"), native_sidecars=found)
    return found


def has_native_sidecars(major: str, minor: str) -> bool:
    """As `/version` says it; a minor may end in `+`.

    Raises:
        ValueError: it is no version.
    """
    digits = re.match(r"\d+", minor)
    if digits is None:
        raise ValueError(f"{major!r}.{minor!r} is no version")
    return (int(major), int(digits[0])) >= _FIRST
