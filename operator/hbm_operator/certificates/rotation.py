"""What is to be done next with the webhook's certificate: a pure function of what there is.

A rotation is four writes, and any of them may be the last one before a crash:

1. stage: the next pair is put into the Secret beside the one that is served;
2. publish: its authority joins the caBundle, where the old one stays;
3. promote: after the API servers have had time to take that up, the next pair is the one to serve;
4. forget: once every replica serves it, the old authority leaves Secret and caBundle.

At each moment the caBundle vouches for whatever any replica serves. Every step starts from the
objects alone, so whoever comes after a crash goes on where it was left.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from hbm_operator.certificates.issue import Pair

_STAGED: Final = "next-"
_PREVIOUS: Final = "previous-ca.crt"
_LAST_THIRD: Final = 1 / 3
"""Share of its life before the end of which a certificate is replaced."""
_TAKE_OVER_S: Final = 150.0
"""Time that certificates of a few minutes are given for it: a kubelet shows a changed Secret to its
pods after up to 90 s. At most half of the life."""


class Step(StrEnum):
    """One write, or none."""

    CREATE = "create"
    STAGE = "stage"
    PUBLISH = "publish"
    PROMOTE = "promote"
    FORGET = "forget"
    NONE = "none"


@dataclass(frozen=True)
class Held:
    """What the Secret holds."""

    current: Pair
    """The pair that replicas are to serve; may be anything that somebody has written there."""
    staged: Pair | None = None
    """The pair that comes next."""
    previous: bytes = b""
    """Authorities, PEM, of pairs that replicas may still serve."""

    @classmethod
    def of(cls, data: Mapping[str, str]) -> Held:
        """Reads the `data` of the Secret; what is missing or no base64 counts as empty."""
        current, staged = _pair(data, ""), _pair(data, _STAGED)
        return cls(current, staged if staged.certificate else None, _decoded(data, _PREVIOUS))

    def to_data(self) -> dict[str, str | None]:
        """All keys of the Secret's `data`; None takes one out."""
        staged = self.staged or Pair(b"", b"", b"")
        return {
            "tls.crt": _encoded(self.current.certificate),
            "tls.key": _encoded(self.current.key),
            "ca.crt": _encoded(self.current.authority),
            f"{_STAGED}tls.crt": _encoded(staged.certificate) or None,
            f"{_STAGED}tls.key": _encoded(staged.key) or None,
            f"{_STAGED}ca.crt": _encoded(staged.authority) or None,
            _PREVIOUS: _encoded(self.previous) or None,
        }

    def promoted(self, now: datetime) -> Held:
        """The staged pair is the current one; the one before is still vouched for."""
        if self.staged is None:
            raise ValueError("no pair is staged")
        return Held(self.staged, None, bundle([self.previous, self.current.authority], now))

    def wanted_bundle(self, published: bytes, now: datetime) -> bytes:
        """The caBundle while any replica may serve any of these pairs.

        What is published already stays: a Secret that somebody has overwritten no longer says what
        the replicas serve.
        """
        staged = self.staged.authority if self.staged else b""
        return bundle([self.current.authority, staged, self.previous, published], now)


@dataclass(frozen=True)
class View:
    """What there is besides the Secret."""

    published: tuple[bytes, ...]
    """The caBundle of each webhook of the configuration, PEM."""
    settled: bool
    """Every caBundle has been as wanted for long enough, as far as this process has seen."""
    all_serve_current: bool | None
    """Whether every replica shows the current certificate; None: not asked."""
    now: datetime
    names: Sequence[str]
    lifetime_s: float


def next_step(held: Held | None, view: View) -> Step:
    """The one thing to do now.

    Args:
        held: the Secret; None: there is none.
        view: everything else.
    """
    if held is None:
        return Step.CREATE
    if held.staged is not None:
        if held.staged.usable_until(view.names, view.now) is None:
            return Step.STAGE
    elif rotation_due(held, view):
        return Step.STAGE
    wanted = held.wanted_bundle(b"".join(view.published), view.now)
    if any(one != wanted for one in view.published):
        return Step.PUBLISH
    if held.staged is not None:
        return Step.PROMOTE if view.settled else Step.NONE
    return Step.FORGET if is_crowded(held, view) and view.all_serve_current else Step.NONE


def rotation_due(held: Held, view: View) -> bool:
    """Whether the current pair cannot serve, or has lived two thirds of its life."""
    ends = held.current.usable_until(view.names, view.now)
    rest_s = min(max(view.lifetime_s * _LAST_THIRD, _TAKE_OVER_S), view.lifetime_s / 2)
    return ends is None or view.now >= ends - timedelta(seconds=rest_s)


def is_crowded(held: Held, view: View) -> bool:
    """Whether more authorities are vouched for than the current one."""
    alone = bundle([held.current.authority], view.now)
    return bool(held.previous) or any(one != alone for one in view.published)


def bundle(parts: Sequence[bytes], now: datetime) -> bytes:
    """The certificates of all parts as one PEM: each once, none expired, in an order of their own.

    What is no certificate is left out.
    """
    found: dict[bytes, x509.Certificate] = {}
    for part in parts:
        for block in _blocks(part):
            try:
                certificate = x509.load_pem_x509_certificate(block)
            except ValueError:
                continue
            if certificate.not_valid_after_utc > now:
                found[certificate.public_bytes(Encoding.DER)] = certificate
    ordered = sorted(found.items(), key=lambda one: (one[1].not_valid_after_utc, one[0]))
    return b"".join(certificate.public_bytes(Encoding.PEM) for _, certificate in ordered)


def published_bundles(configuration: Mapping[str, Any]) -> tuple[bytes, ...]:
    """The caBundle of each webhook of a configuration."""
    return tuple(
        _decoded(webhook.get("clientConfig") or {}, "caBundle")
        for webhook in configuration.get("webhooks") or ()
    )


def _blocks(pem: bytes) -> list[bytes]:
    end = b"-----END CERTIFICATE-----"
    return [block + end + b"\n" for block in pem.split(end)[:-1]]


def _pair(data: Mapping[str, str], prefix: str) -> Pair:
    return Pair(*(_decoded(data, prefix + key) for key in ("tls.crt", "tls.key", "ca.crt")))


def _decoded(data: Mapping[str, Any], key: str) -> bytes:
    try:
        return base64.b64decode(data.get(key) or "", validate=True)
    except (binascii.Error, TypeError, ValueError):
        return b""


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()
