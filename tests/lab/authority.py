"""Certificates for servers and users of the tests."""

import datetime
import ipaddress
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

PEM = serialization.Encoding.PEM
USES = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
USES += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")


def private_pem(key: PrivateKeyTypes) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def public_pem(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def key_usage(authority: bool) -> x509.KeyUsage:
    uses = dict.fromkeys(USES, False)
    return x509.KeyUsage(**{**uses, "key_cert_sign": authority, "digital_signature": not authority})


class Authority:
    """Signs certificates; `pem` is its own. When `strict` they have all the extensions that RFC 5280, 4.2.1, wants."""

    def __init__(self, strict: bool = True, signer: "Authority | None" = None) -> None:
        self.strict = strict
        self.key = ec.generate_private_key(ec.SECP256R1())
        name = "epok tests, intermediate" if signer else "epok tests"
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        basic = x509.BasicConstraints(ca=True, path_length=None)
        self.pem = (signer or self).sign(self.name, self.key.public_key(), basic)

    def intermediate(self) -> "Authority":
        """Another one, whose own certificate this one has signed."""
        return Authority(self.strict, self)

    def issue(
        self, name: str, *addresses: str, names: Sequence[str] = (), organisation: str = "", days: int = 1
    ) -> bytes:
        """A certificate and its private key: of a server at these addresses, or of a user."""
        key = ec.generate_private_key(ec.SECP256R1())
        attributes = [x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]
        if organisation:
            attributes.append(x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, organisation))
        others: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        others += [x509.DNSName(each) for each in names]
        alternative = [x509.SubjectAlternativeName(others)] if others else []
        return self.sign(x509.Name(attributes), key.public_key(), *alternative, days=days) + private_pem(key)

    def sign(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *extensions: x509.ExtensionType, days: int = 1
    ) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        start, end = now - datetime.timedelta(days=9), now + datetime.timedelta(days=days)
        made = x509.CertificateBuilder(self.name, subject, key, x509.random_serial_number(), start, end)
        if self.strict:
            extensions += (
                x509.SubjectKeyIdentifier.from_public_key(key),
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                key_usage(authority=any(isinstance(each, x509.BasicConstraints) for each in extensions)),
            )
        for extension in extensions:
            made = made.add_extension(extension, critical=isinstance(extension, (x509.BasicConstraints, x509.KeyUsage)))
        return made.sign(self.key, hashes.SHA256()).public_bytes(PEM)
