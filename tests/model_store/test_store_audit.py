"""The audit log and the documents of a store: nothing that was written is ever hidden or half."""

import json
from pathlib import Path

import pytest

from model_store.audit import AuditEntry
from model_store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def entry(number: int) -> AuditEntry:
    return AuditEntry(by="someone", action="activate", task="mood", version=number)


class TestAudit:
    def test_an_empty_store_has_none_and_stays_empty(self, store: Store) -> None:
        assert store.audit(10) == []
        assert not store.root.exists()

    def test_gives_the_last_ones_the_newest_last(self, store: Store) -> None:
        entries = [entry(number) for number in range(1, 8)]
        for each in entries:
            store.append_audit(each)
        assert store.audit(3) == entries[-3:]
        assert store.audit(100) == entries

    def test_each_is_one_line_of_json_whatever_it_says(self, store: Store) -> None:
        message = 'a\nb\r\u2028\x00"\\ \N{SNOWMAN}'
        said = entry(1).model_copy(update={"message": message, "result": "StoreError"})
        store.append_audit(said)
        store.append_audit(entry(2))
        lines = (store.root / "audit.jsonl").read_bytes().split(b"\n")
        assert [json.loads(line)["version"] for line in lines[:-1]] == [1, 2]
        assert lines[-1] == b""
        assert store.audit(2) == [said, entry(2).model_copy(update={"at": store.audit(1)[0].at})]

    def test_its_end_is_found_behind_very_many(self, store: Store) -> None:
        line = entry(1).to_line()
        store.append_audit(entry(1))
        (store.root / "audit.jsonl").write_bytes(line * 3000)
        store.append_audit(entry(2))
        assert [found.version for found in store.audit(1000)] == [1] * 999 + [2]

    @pytest.mark.parametrize("torn", [b'{"at": "2026', b"\x00" * 30, b"{}", b"\xff\xfe"])
    def test_a_torn_line_hides_no_other(
        self, store: Store, caplog: pytest.LogCaptureFixture, torn: bytes
    ) -> None:
        first, second = entry(1), entry(2)
        store.append_audit(first)
        with (store.root / "audit.jsonl").open("ab") as file:
            file.write(torn)
        assert store.audit(10) == [first]
        assert "a line is damaged and is left out" in caplog.text
        store.append_audit(second)
        assert store.audit(10) == [first, second]

    def test_a_line_that_lost_only_its_end_counts(self, store: Store) -> None:
        store.append_audit(entry(1))
        path = store.root / "audit.jsonl"
        path.write_bytes(path.read_bytes().removesuffix(b"\n"))
        store.append_audit(entry(2))
        assert [found.version for found in store.audit(10)] == [1, 2]


class TestDocuments:
    def test_what_was_put_is_there_and_the_token_changes_with_it(self, store: Store) -> None:
        assert store.document("keys.json") is None
        assert store.document_token("keys.json") is None
        tokens = []
        for content in (b"one", b"two", b"one"):
            store.put_document("keys.json", content)
            assert store.document("keys.json") == content
            tokens.append(store.document_token("keys.json"))
        assert len(set(tokens)) == 3
        store.put_document("keys.json", b"one")
        assert store.document_token("keys.json") == tokens[-1]

    def test_a_document_and_the_registry_do_not_touch_each_other(self, store: Store) -> None:
        store.put_document("keys.json", b"one")
        token = store.state_token()
        store.put_document("keys.json", b"two")
        assert store.state_token() == token
        assert store.document("other.json") is None

    def test_a_change_starts_from_what_is_there(self, store: Store) -> None:
        for letter in (b"a", b"b"):
            store.change_document("keys.json", lambda old, new=letter: (old or b"") + new)  # type: ignore[misc]
        assert store.document("keys.json") == b"ab"
