"""Keys: how they are made, changed, kept and recognized."""

import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_store.store import Store
from serving.errors import KeysError, UnauthorizedError
from serving.key_book import KeyBook
from serving.keys import DOCUMENT, LOOK_EVERY_S, KeyRing, digest_of, id_of, new_secret
from serving.types import Caller

HOUR = timedelta(hours=1)


class Memory:
    """Documents in memory."""

    def __init__(self) -> None:
        self.data: bytes | None = None
        self.changes = 0
        self.reads = 0
        self.broken = False

    def document(self, name: str) -> bytes | None:
        assert name == DOCUMENT
        self.reads += 1
        return self.data

    def change_document(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        assert name == DOCUMENT
        # As a store does that tries, and finds that somebody else came first.
        change(self.data)
        self.data = change(self.data)
        self.changes += 1

    def document_token(self, name: str) -> int:
        if self.broken:
            raise OSError("the disk is gone")
        return self.changes


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def book(memory: Memory) -> KeyBook:
    return KeyBook(memory)


def bearer(secret: str) -> bytes:
    return f"Bearer {secret}".encode()


def opens(ring: KeyRing, secret: str) -> bool:
    try:
        ring.caller(bearer(secret))
    except UnauthorizedError:
        return False
    return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that keys are compared with; may be set."""
    now = [time.time()]
    monkeypatch.setattr("serving.keys.time.time", lambda: now[0])
    return now


class TestBook:
    def test_a_secret_is_shown_once_and_not_kept(self, book: KeyBook, memory: Memory) -> None:
        key, secret = book.add("shop", ["predict"])
        assert secret.startswith(f"tb_{key.id}_")
        assert len(secret.rpartition("_")[2]) >= 43 or "_" in secret[16:]
        assert memory.data is not None
        assert secret[len(f"tb_{key.id}_") :].encode() not in memory.data
        assert json.loads(memory.data)["keys"][0]["sha256"] == digest_of(secret)

    def test_everything_that_was_asked_for_is_kept(self, book: KeyBook, memory: Memory) -> None:
        _, secret = book.add("shop", ["metrics", "predict"], ["b", "a", "a"], 2.5, HOUR)
        (key,) = KeyBook(memory).keys()
        assert (key.scopes, key.tasks, key.weight) == (("metrics", "predict"), ("a", "b"), 2.5)
        assert key.expires_at == key.created_at + HOUR
        assert KeyRing(memory).caller(bearer(secret)) == Caller(
            "shop", frozenset(("predict", "metrics")), frozenset("ab"), 2.5
        )

    def test_a_name_is_given_once(self, book: KeyBook) -> None:
        book.add("shop", ["predict"])
        with pytest.raises(KeysError, match="taskbone keys rotate shop"):
            book.add("shop", ["admin"])

    @pytest.mark.parametrize("name", ["", "a b", "-a", "a" * 65, "a\n", "../a", "environment"])
    def test_unusable_names(self, book: KeyBook, memory: Memory, name: str) -> None:
        with pytest.raises(KeysError):
            book.add(name, ["predict"])
        assert memory.data is None

    @pytest.mark.parametrize(
        ("scopes", "tasks", "weight"),
        [
            ([], [], 1),
            (["root"], [], 1),
            (["predict"], ["A"], 1),
            (["predict"], ["../a"], 1),
            (["predict"], [], 0),
            (["predict"], [], -1),
            (["predict"], [], float("nan")),
            (["predict"], [], float("inf")),
        ],
    )
    def test_what_no_key_can_be(
        self, book: KeyBook, scopes: list[str], tasks: list[str], weight: float
    ) -> None:
        with pytest.raises(KeysError, match=r"scopes|tasks|weight"):
            book.add("shop", scopes, tasks, weight)  # type: ignore[arg-type]

    def test_rotating_changes_the_secret_and_nothing_else(
        self, book: KeyBook, memory: Memory
    ) -> None:
        before, old = book.add("shop", ["predict"], ["a"], 3, HOUR)
        after, new = book.rotate("shop")
        assert book.keys() == (after,)
        changed = {"id", "sha256", "created_at", "expires_at"}
        assert before.model_dump(exclude=changed) == after.model_dump(exclude=changed)
        assert after.expires_at == after.created_at + HOUR
        ring = KeyRing(memory)
        assert (opens(ring, old), opens(ring, new)) == (False, True)

    def test_a_rotated_key_holds_until_its_grace_ends(
        self, book: KeyBook, memory: Memory, clock: list[float]
    ) -> None:
        _, old = book.add("shop", ["predict"])
        _, new = book.rotate("shop", HOUR)
        ring = KeyRing(memory)
        assert (opens(ring, old), opens(ring, new)) == (True, True)
        clock[0] += 3602
        assert (opens(ring, old), opens(ring, new)) == (False, True)

    def test_a_grace_makes_no_life_longer(self, book: KeyBook) -> None:
        before, _ = book.add("shop", ["predict"], lifetime=HOUR)
        book.rotate("shop", 2 * HOUR)
        assert book.keys()[0].expires_at == before.expires_at

    def test_rotating_without_grace_ends_all_older_ones(
        self, book: KeyBook, memory: Memory
    ) -> None:
        secrets = [book.add("shop", ["predict"])[1], book.rotate("shop", HOUR)[1]]
        secrets.append(book.rotate("shop")[1])
        ring = KeyRing(memory)
        assert [opens(ring, secret) for secret in secrets] == [False, False, True]

    def test_revoking_ends_all_of_a_name_and_no_other(self, book: KeyBook, memory: Memory) -> None:
        secrets = [book.add("shop", ["predict"])[1], book.rotate("shop", HOUR)[1]]
        secrets.append(book.add("other", ["predict"])[1])
        book.revoke("shop")
        ring = KeyRing(memory)
        assert [opens(ring, secret) for secret in secrets] == [False, False, True]

    def test_of_an_unknown_name_the_known_ones_are_said(self, book: KeyBook) -> None:
        with pytest.raises(KeysError, match="there is none"):
            book.revoke("shop")
        book.add("other", ["predict"])
        for change in (book.revoke, book.rotate):
            with pytest.raises(KeysError, match=r"no key 'shop'; keys: other"):
                change("shop")

    @pytest.mark.parametrize(
        "data", [b"", b"{", b"[]", b'{"keys": [{}]}', b'{"format_version": 2}', b"\xff"]
    )
    def test_a_damaged_document_is_said_and_not_overwritten(
        self, memory: Memory, data: bytes
    ) -> None:
        memory.data = data
        with pytest.raises(KeysError, match=DOCUMENT):
            KeyBook(memory).add("shop", ["predict"])
        with pytest.raises(KeysError, match=DOCUMENT):
            KeyRing(memory)
        assert memory.data == data


class TestRing:
    def test_an_unknown_id_and_a_wrong_secret_are_answered_alike(
        self, book: KeyBook, memory: Memory
    ) -> None:
        _, secret = book.add("shop", ["predict"])
        ring = KeyRing(memory)
        wrong = secret[:-1] + ("a" if secret[-1] != "a" else "b")
        messages = set()
        for tried in (wrong, new_secret(), "plain-but-wrong-token", secret + "x", ""):
            with pytest.raises(UnauthorizedError) as caught:
                ring.caller(bearer(tried))
            messages.add(str(caught.value))
        assert len(messages) == 1
        assert "shop" not in messages.pop()

    def test_an_unknown_id_is_compared_too(
        self, memory: Memory, book: KeyBook, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Constant time by construction: one hash and one comparison, whatever is tried."""
        _, secret = book.add("shop", ["predict"])
        ring = KeyRing(memory)
        compared = []

        def compare(one: str, other: str) -> bool:
            compared.append((len(one), len(other)))
            return one == other

        monkeypatch.setattr("serving.keys.hmac.compare_digest", compare)
        for tried in (secret[:-1], new_secret(), "x", secret):
            opens(ring, tried)
        assert compared == [(64, 64)] * 4

    def test_a_right_key_that_expired_is_told_so(
        self, book: KeyBook, memory: Memory, clock: list[float]
    ) -> None:
        _, secret = book.add("shop", ["predict"], lifetime=HOUR)
        ring = KeyRing(memory)
        assert ring.caller(bearer(secret)).name == "shop"
        clock[0] += 3602
        with pytest.raises(UnauthorizedError, match="'shop' expired"):
            ring.caller(bearer(secret))

    def test_what_was_remembered_is_forgotten_with_a_change(
        self, book: KeyBook, memory: Memory
    ) -> None:
        _, secret = book.add("shop", ["predict"])
        ring = KeyRing(memory)
        assert opens(ring, secret)
        book.revoke("shop")
        assert opens(ring, secret), "not yet seen"
        ring.refresh()
        assert not opens(ring, secret)

    def test_the_document_is_read_when_it_changes_alone(
        self, book: KeyBook, memory: Memory
    ) -> None:
        book.add("shop", ["predict"])
        ring = KeyRing(memory)
        reads = memory.reads
        ring.refresh()
        assert memory.reads == reads
        book.add("other", ["predict"])
        ring.refresh()
        assert memory.reads == reads + 1

    def test_it_sees_changes_by_itself(self, tmp_path: Path) -> None:
        book = KeyBook(Store(tmp_path))
        ring = KeyRing(Store(tmp_path)).watch()
        try:
            _, secret = book.add("shop", ["predict"])
            wait_until(lambda: opens(ring, secret))
            _, new = book.rotate("shop")
            wait_until(lambda: opens(ring, new) and not opens(ring, secret))
            book.revoke("shop")
            wait_until(lambda: not opens(ring, new))
        finally:
            ring.close()

    def test_keys_still_hold_while_the_store_cannot_be_read(
        self, book: KeyBook, memory: Memory, caplog: pytest.LogCaptureFixture
    ) -> None:
        _, secret = book.add("shop", ["predict"])
        ring = KeyRing(memory).watch()
        try:
            memory.broken = True
            wait_until(lambda: "the disk is gone" in caplog.text)
            time.sleep(2.5 * LOOK_EVERY_S)
            assert opens(ring, secret)
            assert caplog.text.count("the disk is gone") == 1
            memory.broken = False
            book.revoke("shop")
            wait_until(lambda: not opens(ring, secret))
        finally:
            ring.close()

    def test_a_closed_ring_leaves_no_thread(self, memory: Memory) -> None:
        before = threading.active_count()
        ring = KeyRing(memory).watch()
        ring.close()
        wait_until(lambda: threading.active_count() == before)

    def test_what_it_remembers_is_bounded(self, book: KeyBook, memory: Memory) -> None:
        _, secret = book.add("shop", ["predict"])
        ring = KeyRing(memory)
        for spaces in range(1, 3000):
            assert ring.caller(b"Bearer" + b" " * spaces + secret.encode()).name == "shop"
        assert len(ring._table.seen) <= 1024
        assert max(map(len, ring._table.seen)) <= 512

    def test_nothing_wrong_is_remembered(self, memory: Memory) -> None:
        ring = KeyRing(memory)
        for number in range(100):
            assert not opens(ring, f"wrong-{number}")
        assert ring._table.seen == {}

    @given(header=st.binary(max_size=200))
    def test_any_header_is_refused_with_a_message(self, header: bytes) -> None:
        ring = KeyRing(RIGHT[0])
        with pytest.raises(UnauthorizedError, match="Authorization: Bearer"):
            ring.caller(header)

    @given(
        scheme=st.sampled_from([b"Bearer ", b"bearer\t", b"BEARER  ", b"Basic ", b"", b"Bearer"]),
        start=st.integers(0, 70),
        cut=st.integers(0, 70),
        junk=st.binary(max_size=5),
    )
    def test_nothing_but_the_whole_secret_opens(
        self, scheme: bytes, start: int, cut: int, junk: bytes
    ) -> None:
        memory, secret = RIGHT
        header = scheme + secret[start : start + cut].encode() + junk
        kind, _, rest = header.partition(b" ")
        right = kind.lower() == b"bearer" and rest.strip() == secret.encode()
        try:
            KeyRing(memory).caller(header)
        except UnauthorizedError:
            assert not right
        else:
            assert right


def _right() -> tuple[Memory, str]:
    memory = Memory()
    return memory, KeyBook(memory).add("shop", ["predict"])[1]


RIGHT = _right()


def test_ids_are_those_of_the_secrets() -> None:
    secret = new_secret()
    assert id_of(secret) == secret.split("_")[1]
    assert id_of(secret.upper()) != id_of(secret)
    assert id_of("a-plain-token-of-an-operator") == digest_of("a-plain-token-of-an-operator")[:12]


def wait_until(happens: object) -> None:
    """Wait for something that must happen; a test that waits for ever has failed."""
    assert callable(happens)
    while not happens():
        time.sleep(0.02)
