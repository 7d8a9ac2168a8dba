"""The serving certificate: taken from files, and taken anew when they change.

One `ssl.SSLContext` for the life of the server: a pair loaded into it later counts for the
handshakes after that, and connections that are open stay so.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import structlog
from cryptography import x509

CERTIFICATE, KEY, AUTHORITY = "tls.crt", "tls.key", "ca.crt"


class ServingCertificate:
    """What the webhook shows to the API server.

    Args:
        directory: of `tls.crt`, `tls.key` and, where there is one, `ca.crt`.
        on_load: told whether a changed pair could be taken over.
    """

    def __init__(self, directory: Path, on_load: Callable[[bool], None]) -> None:
        self.context = _server_context()
        self.expires: datetime | None = None
        """When the pair that is served expires; None: there is none yet."""
        self._directory = directory
        self._on_load = on_load
        self._seen: _Files | None = None
        self._served: _Files | None = None
        self._log = structlog.get_logger()

    def reload(self) -> bool:
        """Takes the files over if they have changed. True: another pair is served now.

        A pair that does not fit together, or is not there, leaves the old one in place.
        """
        try:
            files = _Files.read(self._directory)
        except OSError as error:
            if self._seen is not None:
                self._refuse(None, str(error))
            return False
        if files == self._seen:
            return False
        try:
            expires = x509.load_pem_x509_certificate(files.certificate).not_valid_after_utc
            with _in_memory(files.certificate + b"\n" + files.key) as path:
                # Tried first: a failed load would leave the certificate in without its key.
                _server_context().load_cert_chain(path)
                self.context.load_cert_chain(path)
        except (ValueError, OSError) as error:  # ssl.SSLError is an OSError
            self._refuse(files, f"{CERTIFICATE} and {KEY}: {error or type(error).__name__}")
            return False
        self._seen = self._served = files
        self.expires = expires
        self._on_load(True)
        self._log.info("certificate loaded", expires=expires.isoformat())
        return True

    def client_context(self) -> ssl.SSLContext:
        """Trusts what the API server is to trust: `ca.crt`, or without it the pair itself."""
        if self._served is None:
            raise ValueError(f"there is no certificate in {self._directory} yet")
        trusted = self._served.authority.strip() or self._served.certificate
        context = ssl.create_default_context(cadata=trusted.decode())
        # The certificate that is served need not come from an authority that is known here.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return context

    def _refuse(self, files: _Files | None, problem: str) -> None:
        self._seen = files
        self._on_load(False)
        self._log.warning(
            "certificate not loaded", problem=problem, still_serving=self._served is not None
        )


class _Files(NamedTuple):
    certificate: bytes
    key: bytes
    authority: bytes
    """Empty: there is none."""

    @classmethod
    def read(cls, directory: Path) -> _Files:
        certificate = (directory / CERTIFICATE).read_bytes()
        key = (directory / KEY).read_bytes()
        try:
            authority = (directory / AUTHORITY).read_bytes()
        except FileNotFoundError:
            authority = b""
        return cls(certificate, key, authority)


def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = 0  # a resumed session would go on with the certificate before
    return context


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """A path to `content` that lies on no disk: OpenSSL loads key pairs from paths only."""
    descriptor = os.memfd_create("tls")
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
