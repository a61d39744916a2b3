"""Authorities and certificates for tests, valid for a day around now and for 127.0.0.1 only."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate with its private key."""

    public: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, name: str, *, issuer: Self | None = None) -> Self:
        """Of an authority without an issuer; else of one that is neither."""
        key, now, day = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
        subject, signer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key if issuer is None else issuer.key
        made = x509.CertificateBuilder(
            subject_name=subject,
            issuer_name=subject if issuer is None else issuer.public.subject,
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - day,
            not_valid_after=now + day,
        )
        made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        made = made.add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        return cls(made.sign(signer, hashes.SHA256()), key)

    def write(self, path: Path, *, with_key: bool = True, password: bytes | None = None) -> str:
        """As PEM, the key first; returns the path as text."""
        lock = NoEncryption() if password is None else BestAvailableEncryption(password)
        key = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock) if with_key else b""
        path.write_bytes(key + self.public.public_bytes(Encoding.PEM))
        return str(path)
