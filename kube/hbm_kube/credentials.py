"""The token and the TLS context of the next request, read again as their files change."""

from __future__ import annotations

import ssl
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from hbm_kube.config import KubeConfig
from hbm_kube.errors import Unavailable

READ_AGAIN_S: Final = 10.0
"""How old a token or CA in memory may get. A kubelet replaces bound tokens after 80 % of their
life, which is many minutes before the old one ends."""


class Credentials:
    """Caches what the files of a `KubeConfig` hold. `clock` is monotonic, in seconds."""

    def __init__(self, config: KubeConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._token = config.token
        self._token_read_at = float("-inf")
        self._ca: bytes | None = None
        self._ca_read_at = float("-inf")
        self._context: ssl.SSLContext | None = None

    def headers(self) -> dict[str, str]:
        """Those that say who we are. Raises `Unavailable` while the token has never been read."""
        path, now = self._config.token_file, self._clock()
        if path is not None and now - self._token_read_at >= READ_AGAIN_S:
            try:
                self._token = path.read_text().strip()
                self._token_read_at = now
            except (OSError, UnicodeDecodeError) as error:
                if self._token is None:
                    raise Unavailable(f"no token: {path} cannot be read ({error})") from error
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def refused(self) -> bool:
        """The server knows this token no more: True where the file holds another one already."""
        before, self._token_read_at = self._token, float("-inf")
        return (
            self._config.token_file is not None and bool(self.headers()) and (self._token != before)
        )

    def tls(self) -> ssl.SSLContext | bool:
        """The context to connect with; another one after the CA has changed (connections of the
        old one are then not used again). Raises `Unavailable` while there is no usable CA."""
        config = self._config
        if not config.server.startswith("https://"):
            return True
        now = self._clock()
        if self._context is not None and (
            config.ca_file is None or now - self._ca_read_at < READ_AGAIN_S
        ):
            return self._context
        ca, self._ca_read_at = self._read_ca(), now
        if self._context is None or ca != self._ca:
            try:
                self._context, self._ca = _context(config, ca), ca
            except (ssl.SSLError, ValueError) as error:
                if self._context is None:
                    raise Unavailable(f"no CA or client certificate ({error})") from error
        return self._context

    def _read_ca(self) -> bytes | None:
        if self._config.ca_data is not None or self._config.ca_file is None:
            return self._config.ca_data
        try:
            return self._config.ca_file.read_bytes()
        except OSError as error:
            if self._context is None:
                raise Unavailable(f"no CA: {self._config.ca_file} ({error})") from error
            return self._ca


def _context(config: KubeConfig, ca: bytes | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=ca.decode("ascii") if ca else None)
    if not config.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if config.client_cert and config.client_key:
        # OpenSSL takes a client certificate from files only.
        with tempfile.TemporaryDirectory(prefix="hbm-kube-") as directory:
            cert, key = Path(directory, "cert.pem"), Path(directory, "key.pem")
            cert.write_bytes(config.client_cert)
            key.touch(mode=0o600)
            key.write_bytes(config.client_key)
            context.load_cert_chain(cert, key)
    return context
