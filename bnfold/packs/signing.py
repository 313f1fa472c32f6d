"""Signatures of domain packs: Ed25519, by the package `cryptography` (extra `bnfold[signing]`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold.errors import InputError, RuntimeUnavailableError, UsageError, one_line
from bnfold.graph import replacing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


def generate(path: Path | str) -> tuple[Path, Path]:
    """A new key pair, as PEM: at `path` the private key, readable by its owner alone, and beside it
    the public key, NAME.pub.pem.

    Raises UsageError where one of them exists.
    """
    serialization, ed25519 = _libraries()
    private = Path(path)
    public = private.with_name(f"{private.stem}.pub.pem")
    for file in (private, public):
        if file.exists():
            raise UsageError(f"{file} exists; a key is never overwritten. Name another one.")
    key = ed25519.Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with replacing(public) as staged:
        staged.write_bytes(_pem(key.public_key()))
    with replacing(private) as staged:
        staged.touch(mode=0o600)  # its owner's alone before it holds anything
        staged.write_bytes(secret)
    return private, public


def sign(message: bytes, private_key: Path | str) -> dict[str, str]:
    """The signature, and the fingerprint of the key. Raises InputError for a file that is none."""
    serialization, ed25519 = _libraries()
    path = Path(private_key)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise InputError(f"The private key {path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError) as error:  # TypeError: it asks for a password
        raise InputError(
            f"{path} is no private key in PEM without a password ({one_line(error)}); `bnfold pack"
            " keygen` makes one."
        ) from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise InputError(f"{path} is a {type(key).__name__}; packs are signed with Ed25519.")
    return {"key": fingerprint(key.public_key()), "ed25519": key.sign(message).hex()}


def check(message: bytes, signature: Any, public_key: Path | str | bytes, what: str) -> None:
    """Raises InputError where the key did not sign the message; `what` names the file."""
    key = _public(public_key)
    from cryptography.exceptions import InvalidSignature

    ours = fingerprint(key)
    try:
        made = bytes.fromhex(signature["ed25519"])
        if signature != {"key": ours, "ed25519": made.hex()}:
            raise ValueError("of another key, or not as `sign` writes it")
        key.verify(made, message)
    except (InvalidSignature, ValueError, TypeError, KeyError):
        theirs = signature.get("key") if isinstance(signature, Mapping) else None
        why = "its signature is wrong" if theirs == ours else f"key {theirs} did"
        raise InputError(
            f"{what} was not signed by the key that was given ({ours}): {why}. It is refused."
        ) from None


def fingerprint(key: Ed25519PublicKey) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the raw public key."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def _public(given: Path | str | bytes) -> Ed25519PublicKey:
    serialization, ed25519 = _libraries()
    try:
        data = given if isinstance(given, bytes) else Path(given).read_bytes()
        key = serialization.load_pem_public_key(data)
    except OSError as error:
        raise InputError(f"The public key {given!s} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise InputError(f"The public key is no PEM public key ({one_line(error)}).") from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise InputError(
            f"The public key is a {type(key).__name__}; packs are signed with Ed25519."
        )
    found: Ed25519PublicKey = key
    return found


def _pem(key: Ed25519PublicKey) -> bytes:
    serialization, _ = _libraries()
    pem: bytes = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem


def _libraries() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise RuntimeUnavailableError(
            "Signatures need the package cryptography: pip install 'bnfold[signing]'."
        ) from None
    return serialization, ed25519
