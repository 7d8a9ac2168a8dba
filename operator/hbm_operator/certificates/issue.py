"""A serving certificate and the authority that signed it, both new.

The authority's key is thrown away: it signs one certificate and never another, so there is nothing
to steal but the serving key itself.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_SKEW: Final = timedelta(minutes=5)
"""Certificates begin to hold so much before now: clocks of nodes differ."""


@dataclass(frozen=True)
class Pair:
    """A serving certificate with its key, and the authority that vouches for it; PEM."""

    certificate: bytes
    key: bytes
    authority: bytes

    def usable_until(self, names: Sequence[str], now: datetime) -> datetime | None:
        """When the pair expires; None if it cannot serve under these names now.

        Args:
            names: the certificate must have them all.
            now: aware time.
        """
        try:
            certificate = x509.load_pem_x509_certificate(self.certificate)
            authority = x509.load_pem_x509_certificate(self.authority)
            key = serialization.load_pem_private_key(self.key, None)
            certificate.verify_directly_issued_by(authority)
            said = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except Exception:
            # Whatever has been written there, it is no pair of ours.
            return None
        ends = min(certificate.not_valid_after_utc, authority.not_valid_after_utc)
        fits = (
            key.public_key() == certificate.public_key()
            and {_general(name) for name in names} <= set(said.value)
            and certificate.not_valid_before_utc <= now < ends
        )
        return ends if fits else None

    def der(self) -> bytes:
        """The serving certificate as TLS shows it."""
        certificate = x509.load_pem_x509_certificate(self.certificate)
        return certificate.public_bytes(serialization.Encoding.DER)


def issue(names: Sequence[str], lifetime_s: float, now: datetime) -> Pair:
    """A new pair under a new authority.

    Args:
        names: DNS names and addresses that the server is called by; the first one is the subject.
        lifetime_s: how long both hold from `now` on.
        now: aware time.
    """
    serial = x509.random_serial_number()
    authority_key, key = _new_key(), _new_key()
    # A name of its own, so that no verifier takes one authority for another.
    authority_name = _name(f"HBM Partition webhook CA {serial:x}"[:64])
    span = (now - _SKEW, now + timedelta(seconds=lifetime_s))
    authority = (
        _builder(authority_name, authority_name, authority_key, serial, span)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    certificate = (
        _builder(_name(names[0][:64]), authority_name, key, x509.random_serial_number(), span)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_general(name) for name in names]), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )
    return Pair(
        certificate=certificate.public_bytes(serialization.Encoding.PEM),
        key=key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        authority=authority.public_bytes(serialization.Encoding.PEM),
    )


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    serial: int,
    span: tuple[datetime, datetime],
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(span[0])
        .not_valid_after(span[1])
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
