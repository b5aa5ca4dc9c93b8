"""Whether an artifact was signed with a key that the operator trusts: OpenSSF model signing.

A signature is a bundle of that format (`model_signing sign key`, a sigstore bundle in JSON) over
one file: exactly the artifact's bytes. The library checks it; what is asked here beyond that is
that the bundle is about one whole file, since the format also knows folders, parts and exceptions.
Nothing is asked over the network. Needs `taskbone[signing]`; knows neither store nor server.
"""

import base64
import binascii
import tempfile
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from model_store.durable import sha256
from model_store.errors import SignatureError
from model_store.manifest import describe

MAX_BYTES = 16 * 1024
"""Of a bundle; real ones have two thousand."""

_INSTALL = "signatures need the package model-signing: pip install 'taskbone[signing]'"


class _PublicKey(BaseModel):
    hint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of the public key's PEM file."""


class _Material(BaseModel):
    publicKey: _PublicKey


class _Signature(BaseModel):
    sig: str
    keyid: str = ""


class _Envelope(BaseModel):
    payload: str
    payloadType: str
    signatures: list[_Signature] = Field(min_length=1, max_length=1)


class _Bundle(BaseModel):
    """The parts of a bundle that count; the library is given these and no others."""

    mediaType: str
    verificationMaterial: _Material
    dsseEnvelope: _Envelope


class _Resource(BaseModel):
    name: str
    algorithm: str
    digest: str


class _Predicate(BaseModel):
    resources: list[_Resource]


class _Statement(BaseModel):
    predicate: _Predicate


def check_key(public_key: Path) -> None:
    """Raise `SignatureError` unless signatures can be checked with this public key."""
    _verifier(public_key)


def verify(data: bytes, signature: bytes | None, public_key: Path) -> str:
    """Who signed these bytes: the SHA-256 of the public key's file.

    Raises `SignatureError` unless `signature` is a bundle over exactly these bytes, made with the
    private key that belongs to `public_key`.
    """
    if signature is None:
        raise SignatureError(
            "the artifact has no signature, and here every one needs one: sign it with "
            "`model_signing sign key`, and send the bundle along"
        )
    bundle = _parsed(signature)
    _check_subject(bundle.dsseEnvelope.payload, sha256(data))
    with tempfile.TemporaryDirectory(prefix="taskbone-signature-") as folder:
        artifact, written = Path(folder) / "artifact", Path(folder) / "bundle"
        artifact.write_bytes(data)
        written.write_text(bundle.model_dump_json())
        try:
            _verifier(public_key).verify(artifact, written)
        except SignatureError:
            raise
        except Exception as error:  # whatever goes wrong, it is not verified
            reason = str(error).strip() or "the signature does not belong to its content"
            raise SignatureError(f"the signature is not valid: {reason}") from error
    return bundle.verificationMaterial.publicKey.hint


def _parsed(signature: bytes) -> _Bundle:
    if len(signature) > MAX_BYTES:
        raise SignatureError(
            f"the signature has {len(signature)} bytes; expected a bundle of at most {MAX_BYTES}"
        )
    try:
        return _Bundle.model_validate_json(signature)
    except ValidationError as error:
        raise SignatureError(
            f"the signature is no bundle of `model_signing sign key`: {describe(error)}"
        ) from None


def _check_subject(payload: str, digest: str) -> None:
    """Raise unless the statement is about one whole file of this SHA-256."""
    try:
        statement = _Statement.model_validate_json(base64.b64decode(payload, validate=True))
    except (binascii.Error, ValidationError) as error:
        reason = describe(error) if isinstance(error, ValidationError) else str(error)
        raise SignatureError(f"the signature's statement cannot be read: {reason}") from None
    resources = statement.predicate.resources
    if len(resources) != 1 or (resources[0].name, resources[0].algorithm) != (".", "sha256"):
        raise SignatureError(
            "the signature is not about one file and its SHA-256; sign the artifact's file itself, "
            "not its folder, with the default settings"
        )
    if resources[0].digest != digest:
        raise SignatureError(
            f"the signature is for a file with SHA-256 {resources[0].digest[:12]}..., and the "
            f"artifact has {digest[:12]}..."
        )


def _verifier(public_key: Path) -> Any:
    try:
        from model_signing import verifying
    except ImportError as error:
        raise SignatureError(f"{_INSTALL} ({error})") from error
    try:
        return verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:
        raise SignatureError(
            f"{public_key}: signatures cannot be checked with this: {error}; expected the PEM "
            "file of a public key on the curve P-256, P-384 or P-521"
        ) from error
