"""`taskbone keys`: what each command prints and leaves in the store."""

import json
from pathlib import Path
from typing import Any

import pytest

from model_store.store import Store
from serving.config import ServeConfig
from serving.keys import KeyRing, digest_of
from serving.local_key import TOKEN_FILE, prepare
from serving.types import Caller
from tests.cli.running import fail, run, succeed


def caller(store: Store, secret: str) -> Caller:
    return KeyRing(store).caller(f"Bearer {secret}".encode())


def listed() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(succeed("keys", "list", "--json"))
    return found


def add(name: str, *options: str) -> str:
    return succeed("keys", "add", name, *options).splitlines()[-1]


def test_a_new_key_is_the_last_line(store: Store) -> None:
    options = "--scope predict --scope metrics --task b --task a --weight 2 --expires 90d".split()
    secret = add("shop", *options)
    expected = Caller("shop", frozenset(("predict", "metrics")), frozenset("ab"), 2.0)
    assert caller(store, secret) == expected


def test_json_has_the_key_once(store: Store) -> None:
    made = json.loads(succeed("keys", "add", "shop", "--scope", "admin", "--json"))
    assert caller(store, made.pop("key")).scopes == {"admin"}
    assert listed() == [made]


def test_the_list_shows_no_secret_and_no_hash(store: Store) -> None:
    secret = add("shop", "--scope", "predict", "--expires", "12h")
    for output in (succeed("keys", "list"), succeed("keys", "list", "--json")):
        assert "shop" in output
        assert secret not in output
        assert digest_of(secret) not in output


def test_an_empty_store_has_no_keys(store: Store) -> None:
    assert listed() == []
    assert not store.root.exists()


@pytest.mark.parametrize("command", ["rotate", "revoke"])
def test_an_unknown_key(store: Store, command: str) -> None:
    add("other", "--scope", "predict")
    assert fail("keys", command, "shop") == "no key 'shop'; keys: other"


@pytest.mark.parametrize("time", ["90", "d", "-1d", "1y", "0d", "1.5h", "9999999d"])
def test_what_is_no_time(store: Store, time: str) -> None:
    result = run("keys", "add", "shop", "--scope", "predict", "--expires", time)
    assert result.exit_code == 2
    assert "90d" in result.stderr


def test_a_scope_is_needed(store: Store) -> None:
    assert run("keys", "add", "shop").exit_code == 2
    assert run("keys", "add", "shop", "--scope", "root").exit_code == 2


def test_the_local_copy_follows_its_key(store: Store) -> None:
    first = prepare(ServeConfig.of(store=store.root), store, {})
    assert first
    copy = Path(store.root / TOKEN_FILE)
    new = succeed("keys", "rotate", "local", "--keep-old", "1h").splitlines()[1]
    assert copy.read_text().strip() == new != first
    assert caller(store, first) == caller(store, new)
    succeed("keys", "revoke", "local")
    assert not copy.exists()
    assert listed() == []


def test_other_keys_leave_the_local_copy(store: Store) -> None:
    first = prepare(ServeConfig.of(store=store.root), store, {})
    add("shop", "--scope", "predict")
    succeed("keys", "rotate", "shop")
    succeed("keys", "revoke", "shop")
    assert (store.root / TOKEN_FILE).read_text().strip() == first
