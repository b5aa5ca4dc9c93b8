"""Signatures of artifacts: which are taken, and what is said of all others."""

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_store.durable import sha256
from model_store.errors import SignatureError
from model_store.signatures import MAX_BYTES, check_key, verify
from tests.signing import Signer, in_parts, make_signer, rsa_key

DATA = b"the bytes of an artifact" * 1000


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return make_signer(tmp_path_factory.mktemp("signer"))


@pytest.fixture(scope="module")
def bundle(signer: Signer) -> bytes:
    return signer.sign(DATA)


def test_a_good_one_says_who_signed(signer: Signer, bundle: bytes) -> None:
    assert verify(DATA, bundle, signer.public) == sha256(signer.public.read_bytes())


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=["P-384", "P-521"])
def test_other_curves(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    signer = make_signer(tmp_path, curve)
    assert verify(DATA, signer.sign(DATA), signer.public)


def test_none_is_refused(signer: Signer) -> None:
    with pytest.raises(SignatureError, match="has no signature"):
        verify(DATA, None, signer.public)


@pytest.mark.parametrize("data", [DATA + b"\n", DATA[:-1], b""])
def test_other_bytes_are_refused(signer: Signer, bundle: bytes, data: bytes) -> None:
    with pytest.raises(SignatureError, match=f"SHA-256 {sha256(DATA)[:12]}"):
        verify(data, bundle, signer.public)


def test_another_key_is_refused(signer: Signer, bundle: bytes, tmp_path: Path) -> None:
    other = make_signer(tmp_path)
    with pytest.raises(SignatureError, match="Key mismatch"):
        verify(DATA, bundle, other.public)


def test_a_hint_of_the_right_key_is_not_enough(
    signer: Signer, bundle: bytes, tmp_path: Path
) -> None:
    forged = json.loads(make_signer(tmp_path).sign(DATA))
    forged["verificationMaterial"] = json.loads(bundle)["verificationMaterial"]
    with pytest.raises(SignatureError, match="does not belong to its content"):
        verify(DATA, json.dumps(forged).encode(), signer.public)


def changed(bundle: bytes, change: Callable[[Any], None]) -> bytes:
    """The bundle with its statement changed, and the signature as it was."""
    found = json.loads(bundle)
    statement = json.loads(base64.b64decode(found["dsseEnvelope"]["payload"]))
    change(statement)
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    found["dsseEnvelope"]["payload"] = payload
    return json.dumps(found).encode()


def test_a_statement_that_was_changed_is_refused(signer: Signer, bundle: bytes) -> None:
    other = b"other bytes"

    def change(statement: Any) -> None:
        statement["predicate"]["resources"][0]["digest"] = sha256(other)

    with pytest.raises(SignatureError, match="does not belong to its content"):
        verify(other, changed(bundle, change), signer.public)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"null",
        b"\xff\xfe",
        b"not a bundle",
        b'{"mediaType": 1}',
        b"[" * 10_000,
        DATA,
    ],
)
def test_what_is_no_bundle(signer: Signer, text: bytes) -> None:
    with pytest.raises(SignatureError, match=r"is no bundle|expected a bundle"):
        verify(DATA, text, signer.public)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("mediaType",), "application/json"),
        (("dsseEnvelope", "payload"), "%%%"),
        (("dsseEnvelope", "payload"), ""),
        (("dsseEnvelope", "payload"), base64.b64encode(b"{}").decode()),
        (("dsseEnvelope", "payload"), base64.b64encode(b"[" * 5000).decode()),
        (("dsseEnvelope", "payloadType"), "text/plain"),
        (("dsseEnvelope", "signatures"), []),
        (("dsseEnvelope", "signatures"), [{"sig": "AAAA"}]),
        (("dsseEnvelope", "signatures"), [{"sig": "%%%"}]),
        (("dsseEnvelope", "signatures"), [{"sig": ""}]),
        (("verificationMaterial", "publicKey", "hint"), ""),
        (("verificationMaterial", "publicKey", "hint"), None),
        (("verificationMaterial", "publicKey"), {}),
    ],
)
def test_a_damaged_bundle(
    signer: Signer, bundle: bytes, path: tuple[str, ...], value: object
) -> None:
    found = json.loads(bundle)
    inner = found
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(SignatureError):
        verify(DATA, json.dumps(found).encode(), signer.public)


def test_two_signatures_are_not_one(signer: Signer, bundle: bytes) -> None:
    found = json.loads(bundle)
    found["dsseEnvelope"]["signatures"] *= 2
    with pytest.raises(SignatureError, match="signatures"):
        verify(DATA, json.dumps(found).encode(), signer.public)


def test_a_signature_over_a_folder_is_refused(signer: Signer, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "artifact").write_bytes(DATA)
    signed = signer.sign_path(folder, tmp_path / "bundle")
    with pytest.raises(SignatureError, match="not about one file"):
        verify(DATA, signed, signer.public)


def test_a_signature_over_an_empty_folder_is_refused(signer: Signer, tmp_path: Path) -> None:
    """It is over nothing, so nothing in it could differ."""
    folder = tmp_path / "folder"
    folder.mkdir()
    signed = signer.sign_path(folder, tmp_path / "bundle")
    with pytest.raises(SignatureError, match="not about one file"):
        verify(DATA, signed, signer.public)


def test_a_signature_over_parts_is_refused(signer: Signer) -> None:
    with pytest.raises(SignatureError, match="not about one file"):
        verify(DATA, signer.sign(DATA, in_parts(len(DATA) // 2)), signer.public)


def test_a_second_statement_beside_the_signed_one_is_not_looked_at(
    signer: Signer, bundle: bytes
) -> None:
    """A reader that knows both spellings of a name must not choose the other one."""
    other = signer.sign(b"other bytes")
    both = json.loads(bundle) | {"dsse_envelope": json.loads(other)["dsseEnvelope"]}
    assert verify(DATA, json.dumps(both).encode(), signer.public)
    with pytest.raises(SignatureError):
        verify(b"other bytes", json.dumps(both).encode(), signer.public)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(position=st.integers(0, MAX_BYTES), byte=st.integers(0, 255))
def test_a_changed_byte_never_makes_it_good_for_other_bytes(
    signer: Signer, bundle: bytes, position: int, byte: int
) -> None:
    mutated = bytearray(bundle)
    mutated[position % len(bundle)] = byte
    with pytest.raises(SignatureError):
        verify(b"other bytes", bytes(mutated), signer.public)


def test_a_key_is_checked_before_it_is_needed(signer: Signer, tmp_path: Path) -> None:
    check_key(signer.public)
    (tmp_path / "text").write_text("no key")
    for path in (tmp_path / "missing", tmp_path / "text", tmp_path, rsa_key(tmp_path / "rsa")):
        with pytest.raises(SignatureError, match=str(path)):
            check_key(path)


def test_without_the_package_it_is_said_how_to_get_it(
    signer: Signer, bundle: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for call in (lambda: check_key(signer.public), lambda: verify(DATA, bundle, signer.public)):
        with pytest.raises(SignatureError, match=r"pip install 'taskbone\[signing\]'"):
            call()


def test_nothing_is_left_behind(
    signer: Signer, bundle: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    verify(DATA, bundle, signer.public)
    with pytest.raises(SignatureError):
        verify(DATA + b"x", bundle, signer.public)
    assert list(tmp_path.iterdir()) == []
