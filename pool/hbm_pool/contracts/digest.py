"""What a pod tells the router: `NodeState` (a Redis hash) and the digest (a blob).

Keys, for namespace `ns` and node `name` (in Kubernetes the pod uid):

* `hbm:{ns}:nodes`     ZSET, member = name, score = heartbeat, Unix ms
* `hbm:{ns}:n:{name}`  HASH of `NodeState`, expires
* `hbm:{ns}:d:{name}`  digest blob, expires
"""

from __future__ import annotations

from typing import NamedTuple


class NodeState(NamedTuple):
    """A pod's load and its own measured costs, as written at each heartbeat.

    Times are ms. `kv_miss_ms(L) = cost_token_ms * L + cost_token_context_ms * L * L / 2`.
    """

    schema: int
    name: str
    url: str
    boot_epoch: int
    sequence: int
    heartbeat_unix_ms: int
    alpha: float
    queue_depth: int
    queue_ms: float
    service_ms: float  # mean of the last window
    cost_fixed_ms: float
    cost_token_ms: float
    cost_token_context_ms: float
    cost_row_ms: float  # mean over classes, weighted by their misses
    rows_per_token: float  # lookups per computed token
    emb_miss_ratio: float
    page_tokens: int
    draining: bool
    digest_sequence: int
    digest_crc: int
    model: str
    model_version: int
