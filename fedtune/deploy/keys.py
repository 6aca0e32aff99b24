"""Keys of a federation: a certificate authority, the server's certificate, and one key a client.

    FOLDER/ca.key                  signs certificates; stays where it was made
    FOLDER/server/                 for the server: ca.crt, server.crt, server.key, clients.json
    FOLDER/clients/NAME/           for the client NAME: ca.crt, client.key, clients.json, accept.yaml

A client proves who it is with its private key, and the server knows the public ones by name from
clients.json; who stands first in it is client 0. Clients have that list too: under secure aggregation they
take no key of a round that its client did not sign. In the server's list an entry may be {"key": ...,
"examples": N}: a client that registers more than N examples does not take part. accept.yaml is an example to
fill in. Private keys can be read by their owner alone.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import re
import ssl
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.errors import InputError
from fedtune.protection.identity import Identity
from fedtune.transport.acceptance import EXAMPLE

CURVE = ec.SECP384R1
CA_DAYS = 3650
SLACK = datetime.timedelta(days=2)  # clocks of two machines differ, by a day where one was never set
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def make_keys(folder: Path, hosts: Sequence[str], clients: Sequence[str], *, days: int) -> list[str]:
    """Makes what is missing in a federation's folder; what is there stays as it is.

    Args:
        folder: The federation's folder.
        hosts: Names and addresses by which clients reach the server, beside localhost; for a new certificate.
        clients: Names; those that are new get a key and the next numbers.
        days: How long the server's certificate is valid.

    Returns:
        The names of all clients, in the order of their numbers.

    Raises:
        InputError: A name cannot be one, or the folder holds something else.
    """
    for name in clients:
        if not NAME.fullmatch(name):
            raise InputError(
                f"{name!r} cannot be a client's name: letters, digits, dots, dashes and underscores can"
            )
    if len(set(clients)) != len(clients):
        raise InputError(f"a client's name stands twice in {', '.join(clients)}")
    server, people = folder / "server", folder / "clients"
    try:
        for path in (server, people):
            path.mkdir(parents=True, exist_ok=True)
        authority, key = open_authority(folder)
        if not (server / "server.crt").exists():
            if not hosts:
                raise InputError(
                    "give the names or addresses by which clients reach the server: --server HOST"
                )
            own = ec.generate_private_key(CURVE())
            _write_secret(server / "server.key", private_pem(own))
            certificate = server_certificate(authority, key, own, hosts, days)
            (server / "server.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
        (server / "ca.crt").write_bytes(authority.public_bytes(Encoding.PEM))
        there = (server / "clients.json").exists()
        known, expected = (read_clients(server), expected_examples(server)) if there else ({}, {})
        for name in clients:
            if name not in known:
                (people / name).mkdir(exist_ok=True)
                private = ec.generate_private_key(CURVE())
                secret = private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
                _write_secret(people / name / "client.key", secret)
                (people / name / "ca.crt").write_bytes(authority.public_bytes(Encoding.PEM))
                (people / name / "accept.yaml").write_text(EXAMPLE, encoding="utf-8")
                public = private.public_key()
                known[name] = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        own_list = {
            n: {"key": pem, "examples": expected[n]} if n in expected else pem for n, pem in known.items()
        }
        (server / "clients.json").write_text(json.dumps(own_list, indent=2) + "\n", encoding="utf-8")
        for place in (people / name for name in known if (people / name).is_dir()):
            (place / "clients.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error}") from None
    return list(known)


def read_clients(server: Path) -> dict[str, str]:
    """The public key of each client in PEM, by its name, in the order of their numbers.

    Raises:
        InputError: clients.json is missing or not one.
    """
    return {name: str(entry["key"]) for name, entry in _clients(server).items()}


def expected_examples(server: Path) -> dict[str, int]:
    """How many examples a client may register at most, by its name, where clients.json says that.

    Raises:
        InputError: clients.json is missing or not one.
    """
    return {name: entry["examples"] for name, entry in _clients(server).items() if "examples" in entry}


def _clients(server: Path) -> dict[str, dict[str, Any]]:
    path = server / "clients.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}; fedtune keys makes it") from None
    if not isinstance(known, dict):
        raise InputError(f"{path}: must map clients' names to their public keys; fedtune keys makes it")
    entries = {name: {"key": value} if isinstance(value, str) else value for name, value in known.items()}
    for name, entry in entries.items():
        most = entry.get("examples", 1) if isinstance(entry, dict) else 0
        if (
            not isinstance(entry, dict)
            or not entry.keys() <= {"key", "examples"}
            or not isinstance(entry.get("key"), str)
            or type(most) is not int
            or most < 1
        ):
            raise InputError(
                f'{path}: {name} must have its public key, or {{"key": KEY, "examples": N}} with the number '
                "of examples that it may register at most, 1 or more; fedtune keys makes it"
            )
    return entries


def check_server(server: Path) -> None:
    """Raises InputError if a file of the server is missing, open to others, expired or another's."""
    for name in ("ca.crt", "server.crt", "server.key", "clients.json"):
        _require(server / name)
    check_secret(server / "server.key")
    authority = _certificate(server / "ca.crt")
    certificate = _certificate(server / "server.crt")
    _check_valid(server / "ca.crt", authority)
    _check_valid(server / "server.crt", certificate)
    try:
        certificate.verify_directly_issued_by(authority)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server / "server.crt", server / "server.key")
    except (ValueError, TypeError, ssl.SSLError) as error:
        raise InputError(
            f"{server}: ca.crt, server.crt and server.key do not belong together: {error}"
        ) from None
    except Exception as error:  # cryptography raises InvalidSignature, which is no ValueError
        raise InputError(f"{server}: server.crt was not signed by ca.crt: {type(error).__name__}") from None


def check_client(folder: Path) -> str:
    """Checks a client's files; returns the public key in PEM.

    Raises:
        InputError: A file is missing, the key is open to others or no key, or the authority has expired.
    """
    for name in ("ca.crt", "client.key"):
        _require(folder / name)
    check_secret(folder / "client.key")
    _check_valid(folder / "ca.crt", _certificate(folder / "ca.crt"))
    try:
        private = serialization.load_ssh_private_key((folder / "client.key").read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / 'client.key'}: not a private key: {error}") from None
    return private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def read_identity(folder: Path) -> Identity | None:
    """What a client signs with and holds others' signatures to; None if its folder has no clients.json.

    Raises:
        InputError: The list is damaged, or does not have this client's own key.
    """
    if not (folder / "clients.json").exists():
        return None
    private = serialization.load_ssh_private_key((folder / "client.key").read_bytes(), None)
    known: list[Any] = []
    for name, pem in read_clients(folder).items():
        try:
            known.append(serialization.load_pem_public_key(pem.encode()))
        except ValueError as error:
            raise InputError(f"{folder / 'clients.json'}: the key of {name} is none: {error}") from None
    identity = Identity(cast(ec.EllipticCurvePrivateKey, private), known)
    if identity.number() is None:
        raise InputError(
            f"{folder / 'clients.json'} does not have the key of {folder / 'client.key'}; put the list there "
            "that fedtune keys made with it, or a newer one of the same federation"
        )
    return identity


def check_secret(path: Path) -> None:
    """Raises InputError if others than the owner can read a private key."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise InputError(
            f"{path} is open to other users (mode {mode:03o}): whoever reads it can pass for you. "
            f"Run chmod 600 {path}, and if others may have read it, have a new key made"
        )


def _require(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; fedtune keys makes it, and says where it belongs")


def open_authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The federation's certificate authority, made if there is none."""
    path, secret = folder / "server" / "ca.crt", folder / "ca.key"
    if secret.exists():
        check_secret(secret)
        try:
            key = serialization.load_pem_private_key(secret.read_bytes(), None)
        except (ValueError, TypeError) as error:
            raise InputError(f"{secret}: not a private key: {error}") from None
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return _certificate(path), key
    if any((folder / "server").iterdir()) or any((folder / "clients").iterdir()):
        raise InputError(f"{folder} holds keys but no ca.key, which made them; give a new folder")
    key = ec.generate_private_key(CURVE())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedtune federation")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SLACK)
        .not_valid_after(now + datetime.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=False, certify=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    _write_secret(secret, private_pem(key))
    path.write_bytes(certificate.public_bytes(Encoding.PEM))
    return certificate, key


def server_certificate(
    authority: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    own: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    days: int,
) -> x509.Certificate:
    """A server's certificate, which the authority signs with its key.

    Args:
        authority: The federation's.
        key: Its private key.
        own: The server's private key.
        hosts: Names and addresses that clients reach the server by; this machine's own are always there.
        days: From now until it expires.
    """
    names = [_general_name(host) for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedtune server")]))
        .issuer_name(authority.subject)
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SLACK)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=True, certify=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def _usage(*, sign: bool, certify: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=sign,
        key_cert_sign=certify,
        crl_sign=certify,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        try:
            return x509.DNSName(host)
        except ValueError:
            raise InputError(f"--server {host!r} is neither a host's name nor an address") from None


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a certificate: {error}") from None


def _check_valid(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        raise InputError(
            f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; remove it and its key and run "
            "fedtune keys again"
        )
    if now < certificate.not_valid_before_utc:
        raise InputError(
            f"{path} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on; is this clock "
            "right?"
        )


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as its file holds it, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write_secret(path: Path, content: bytes) -> None:
    """Writes a file that nobody else can read, at no moment."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
