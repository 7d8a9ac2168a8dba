"""The Secret `hbm-redis` as it is mounted into sidecars and routers: `url`, and `ca.crt` for TLS.

The volume is optional: the file may come long after the process has started, and a kubelet replaces
it whenever the Secret changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

SCHEMES: Final = ("redis", "rediss", "unix")
MAX_BYTES: Final = 4096


class RedisSecret:
    """The address in `path`, followed from look to look. Messages never hold the address, which has
    a password in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url: str | None = None
        """None while there is no usable address; with TLS it names the CA that lies beside it."""
        self.problem = f"{path} is not there yet"
        """Why there is none; empty when there is one."""

    def poll(self) -> bool:
        """Look again; True when `url` is another one. An address that became unusable stays."""
        before = self.url
        try:
            with self.path.open("rb") as file:
                text = file.read(MAX_BYTES).decode().strip()
        except FileNotFoundError:
            self.problem = f"{self.path} is not there yet"
            return False
        except (OSError, UnicodeDecodeError) as error:
            self.problem = f"{self.path} cannot be read ({type(error).__name__})"
            return False
        self.problem = self._complaint(text)
        if not self.problem:
            self.url = self._with_ca(text)
        return self.url != before

    def _complaint(self, text: str) -> str:
        try:
            parts = urlsplit(text)
            _ = parts.port
        except ValueError:
            return f"{self.path} holds no Redis address (its port is no number)"
        if parts.scheme not in SCHEMES:
            return f"{self.path} holds no Redis address (redis://, rediss:// or unix://)"
        return ""

    def _with_ca(self, text: str) -> str:
        ca = self.path.with_name("ca.crt")
        if not text.startswith("rediss://") or not ca.exists():
            return text
        return f"{text}{'&' if '?' in text else '?'}ssl_ca_certs={quote(str(ca))}"
