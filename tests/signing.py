"""Keys and signatures for tests, made as `model_signing sign key` makes them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from model_signing import hashing, signing


@dataclass(frozen=True)
class Signer:
    """A pair of keys, and a folder to sign in."""

    folder: Path
    private: Path
    public: Path

    def sign(self, data: bytes, configured: "hashing.Config | None" = None) -> bytes:
        """The bundle over these bytes."""
        artifact, bundle = self.folder / "any-name.safetensors", self.folder / "bundle"
        artifact.write_bytes(data)
        return self.sign_path(artifact, bundle, configured)

    def sign_path(
        self, path: Path, bundle: Path, configured: "hashing.Config | None" = None
    ) -> bytes:
        """The bundle over a file or a folder."""
        config = signing.Config().use_elliptic_key_signer(private_key=self.private)
        if configured is not None:
            config.set_hashing_config(configured)
        config.sign(path, bundle)
        return bundle.read_bytes()


def in_parts(size: int) -> hashing.Config:
    """The setting with which every `size` bytes of a file are signed as a part of their own."""
    return hashing.Config().use_shard_serialization(shard_size=size)


def make_signer(folder: Path, curve: "ec.EllipticCurve | None" = None) -> Signer:
    """A new pair of keys."""
    folder.mkdir(parents=True, exist_ok=True)
    return _written(folder, ec.generate_private_key(curve or ec.SECP256R1()))


def rsa_key(folder: Path) -> Path:
    """A public key of a kind that is not for signatures of artifacts."""
    folder.mkdir(parents=True, exist_ok=True)
    return _written(folder, rsa.generate_private_key(65537, 2048)).public


def _written(folder: Path, key: Any) -> Signer:
    private, public = folder / "key.pem", folder / "key.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return Signer(folder, private, public)
