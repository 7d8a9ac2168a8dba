"""A backend as a process of its own, to be killed: `python backend_process.py NAME PORT DELAY_MS`.

Speaks the headers of the model server; remembers users, so that it can say what it reused.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import uvicorn


def main() -> None:
    name, port, delay_ms = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    seen: set[bytes] = set()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        size = 0
        while True:
            message = await receive()
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                break
        if scope["path"] == "/download":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(int(scope["query_string"])):
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
            return
        if scope["path"] != "/v2/health/ready":
            await asyncio.sleep(delay_ms / 1000)
        user = dict(scope["headers"]).get(b"x-user-id", b"")
        reused = b"16" if user in seen else b"0"
        seen.add(user)
        body = f"{name} {size}".encode()
        headers = [
            (b"content-length", b"%d" % len(body)),
            (b"x-hbm-kv-reused-tokens", reused),
            (b"x-hbm-history-tokens", b"20"),
            (b"x-hbm-service-ms", b"%.1f" % delay_ms),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    uvicorn.run(
        app, host="127.0.0.1", port=port, log_level="error", http="httptools", loop="uvloop"
    )


if __name__ == "__main__":
    main()
