"""HTTP headers of the project: one place for the names, so that no two processes disagree."""

from typing import Final

# Request, set by the client.
USER_ID: Final = "x-user-id"
"""Names the user (any UTF-8 string of 1 to 256 bytes). Without it a request is never cached."""
HISTORY_TOKENS: Final = "x-hbm-history-tokens"
"""Length of the history in the body. Optional: lets the router price a request it does not parse.
The server repeats the true value in its response."""
CANDIDATES: Final = "x-hbm-candidates"
"""Number of candidates in the body. Optional; repeated in the response."""
REQUEST_ID: Final = "x-request-id"
"""Passed through unchanged, made by the router where absent."""
DEADLINE_MS: Final = "x-hbm-deadline-ms"
"""Latency budget of this request; nodes that would miss it are skipped, a server may refuse it."""

TOP_SHARDS: Final = "x-hbm-top-shards"
"""EMB shards that hold most of this user's rows, most first: `3,17,4`. Optional, in a request or a
response; the router's `weighted` policy compares it with the coverage in each node's digest."""

# Response, set by the model server: the router checks itself against these.
KV_REUSED_TOKENS: Final = "x-hbm-kv-reused-tokens"
"""History tokens whose KV was found in the cache (0 on a miss)."""
ROWS_LOOKED_UP: Final = "x-hbm-rows-looked-up"
ROWS_MISSED: Final = "x-hbm-rows-missed"
SERVICE_MS: Final = "x-hbm-service-ms"
"""Gather and compute of this request's batch, without queueing."""
QUEUE_MS: Final = "x-hbm-queue-ms"
ALPHA: Final = "x-hbm-alpha"
MODEL_VERSION: Final = "x-hbm-model-version"
KV_ROW_LAG_S: Final = "x-hbm-kv-row-lag-s"
"""How old the row values inside the reused KV may be, in seconds (0 when nothing was pushed)."""

# Response, set by the router.
NODE: Final = "x-hbm-node"
DECISION: Final = "x-hbm-decision"
"""Why this node: `kv=hit;est_ms=12.3;why=cost;source=header` (router.md explains each word)."""
DROPPED_REASON: Final = "x-hbm-dropped-reason"
