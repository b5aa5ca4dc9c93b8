"""The commands `taskbone keys`."""

import re
from datetime import timedelta
from typing import Any

import click
from click.shell_completion import CompletionItem

from model_store.errors import ModelStoreError
from model_store.options import complete_tasks, folder_store, json_option, store_option
from model_store.store import Store
from model_store.tables import show_json, show_table
from serving.errors import ServingError
from serving.key_book import KeyBook
from serving.keys import Key
from serving.local_key import TOKEN_FILE, replace_local_copy
from serving.types import SCOPES, Scope

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def _as_time(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> timedelta | None:
    if value is None:
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,5})([smhdw])", value)
    if not found:
        raise click.BadParameter(f"{value!r} is no time; give one like 90d, 12h or 30m")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def complete_keys(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The store's keys whose names begin with what was typed; none where it cannot be read."""
    store = folder_store(context)
    try:
        keys = _book(store).keys() if store else ()
    except (ModelStoreError, ServingError):
        return []
    names = dict.fromkeys(key.name for key in keys)  # a rotated key's older secrets have it, too
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@click.group("keys")
def key_commands() -> None:
    """Make, rotate and revoke the keys that open a server.

    A running server takes up every change within a second. A key is shown once, when it is made:
    the store keeps its hash.

    \b
    Example:
        taskbone keys add shop --scope predict
    """


@key_commands.command("add")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    type=click.Choice(sorted(SCOPES)),
    help="What it opens: predictions, metrics, or changes of what is served; once for each.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    shell_complete=complete_tasks,
    help="A task that it is for.  [default: all]",
)
@click.option(
    "--weight",
    type=float,
    default=1.0,
    show_default=True,
    help="Its share of the queue and of the turns, against other keys.",
)
@click.option(
    "--expires", callback=_as_time, metavar="TIME", help="When it ends, as 90d.  [default: never]"
)
@store_option
@json_option
def keys_add(
    name: str,
    scopes: tuple[Scope, ...],
    tasks: tuple[str, ...],
    weight: float,
    expires: timedelta | None,
    store: Store,
    as_json: bool,
) -> None:
    """Make a key and show it, this once.

    \b
    Examples:
        taskbone keys add shop --scope predict --scope metrics
        taskbone keys add spam --scope predict --task sms_spam --expires 90d
        taskbone keys add deploy --scope admin
    """
    key, secret = _book(store).add(name, scopes, tasks, weight, expires)
    _show_new(key, secret, as_json)


@key_commands.command("list")
@store_option
@json_option
def keys_list(store: Store, as_json: bool) -> None:
    """List the keys of the store: what each opens, and until when. Never the keys themselves.

    \b
    Example:
        taskbone keys list --json
    """
    keys = _book(store).keys()
    if as_json:
        show_json([_facts(key) for key in keys])
        return
    heads = ("name", "id", "scopes", "tasks", "weight", "made", "ends")
    show_table(f"Keys in {store.location}", heads, (_row(key) for key in keys))


@key_commands.command("rotate")
@click.argument("name", shell_complete=complete_keys)
@click.option(
    "--keep-old",
    callback=_as_time,
    metavar="TIME",
    help="How long the old one goes on to work, as 1h.  [default: not at all]",
)
@store_option
@json_option
def keys_rotate(name: str, keep_old: timedelta | None, store: Store, as_json: bool) -> None:
    """Give a key a new secret and show it, this once.

    \b
    Example:
        taskbone keys rotate shop --keep-old 1h
    """
    book = _book(store)
    before = book.keys()
    key, secret = book.rotate(name, keep_old)
    copied = replace_local_copy(store.folder, _named(before, name), secret)
    _show_new(key, secret, as_json)
    if copied and not as_json:
        click.echo(f"The store's file {TOKEN_FILE} has the new one.")


@key_commands.command("revoke")
@click.argument("name", shell_complete=complete_keys)
@store_option
@json_option
def keys_revoke(name: str, store: Store, as_json: bool) -> None:
    """Make a key worthless, with all its older secrets that still worked.

    \b
    Example:
        taskbone keys revoke shop
    """
    book = _book(store)
    before = book.keys()
    book.revoke(name)
    replace_local_copy(store.folder, _named(before, name), None)
    if as_json:
        show_json({"revoked": name})
    else:
        click.echo(f"Revoked {name}.")


def _book(store: Store) -> KeyBook:
    return KeyBook(store)


def _named(keys: tuple[Key, ...], name: str) -> tuple[Key, ...]:
    return tuple(key for key in keys if key.name == name)


def _facts(key: Key) -> dict[str, Any]:
    return key.model_dump(mode="json", exclude={"sha256"}) | {"live": key.is_live}


def _row(key: Key) -> tuple[str, ...]:
    ends = "" if key.expires_at is None else f"{key.expires_at:%Y-%m-%d %H:%M}"
    return (
        key.name,
        key.id,
        ", ".join(key.scopes),
        "all" if key.tasks is None else ", ".join(key.tasks),
        f"{key.weight:g}",
        f"{key.created_at:%Y-%m-%d %H:%M}",
        ends if key.is_live else f"{ends} (expired)",
    )


def _show_new(key: Key, secret: str, as_json: bool) -> None:
    if as_json:
        show_json(_facts(key) | {"key": secret})
        return
    ends = "" if key.expires_at is None else f", until {key.expires_at:%Y-%m-%d %H:%M} UTC"
    click.echo(f"Key {key.name} ({', '.join(key.scopes)}{ends}); it is not shown again:")
    click.echo(secret)
