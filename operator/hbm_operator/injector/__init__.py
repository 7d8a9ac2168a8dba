"""Pod in, pod with the sidecar out: pure, without a policy and without the API.

`inject` decides and edits; `json_patch` says the difference as a webhook must; `Stamp` is what an
injected pod carries and what the controller reads.
"""

from hbm_operator.injector.inject import (
    Injection,
    NamespaceFacts,
    Outcome,
    failed,
    inject,
)
from hbm_operator.injector.patch import json_patch
from hbm_operator.injector.settings import InjectionSettings
from hbm_operator.injector.skip import SkipReason
from hbm_operator.injector.stamp import Stamp

__all__ = [
    "Injection",
    "InjectionSettings",
    "NamespaceFacts",
    "Outcome",
    "SkipReason",
    "Stamp",
    "failed",
    "inject",
    "json_patch",
]
