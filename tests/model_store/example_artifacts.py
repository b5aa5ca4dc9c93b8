"""Artifacts for tests of the store, which looks at their bytes, digest and task name alone."""

import hashlib
import json

from model_store.manifest import (
    METADATA_KEY,
    BackboneReference,
    Golden,
    LinearHead,
    Manifest,
    Prompt,
    Provenance,
    VerifiedArtifact,
)

FINGERPRINT = "ab" * 32


def example_manifest(task: str = "mood", fingerprint: str = FINGERPRINT) -> Manifest:
    """The smallest valid manifest."""
    return Manifest(
        task=task,
        labels=("bad", "good"),
        backbone=BackboneReference(name="tiny", fingerprint=fingerprint),
        template=("{text}",),
        max_tokens=32,
        prompt=Prompt(tokens=0),
        read="cls",
        head=LinearHead(),
        components=("ffn_neurons", "head"),
        ffn_kept=(1, 2),
        ffn_width=4,
        provenance=Provenance(command="none", created="2026-01-01T00:00:00+00:00", seed=0),
        golden=(Golden(input="fine", scores=(0.25, 0.75)),),
    )


def example_artifact(task: str = "mood", data: bytes = b"first") -> VerifiedArtifact:
    """Any bytes, passed off as verified."""
    digest = hashlib.sha256(data).hexdigest()
    return VerifiedArtifact(data=data, digest=digest, manifest=example_manifest(task))


def example_file(task: str = "mood", note: str = "") -> VerifiedArtifact:
    """An artifact with a real header and manifest, and no tensors."""
    manifest = example_manifest(task).model_copy(update={"description": note})
    header = json.dumps({"__metadata__": {METADATA_KEY: manifest.to_json()}}).encode()
    data = len(header).to_bytes(8, "little") + header
    digest = hashlib.sha256(data).hexdigest()
    return VerifiedArtifact(data=data, digest=digest, manifest=manifest)
