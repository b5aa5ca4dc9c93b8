"""What the commands that ask a running server share: where it is, and which key they show it."""

from collections.abc import Callable
from typing import Any

import click

from model_store.options import store_option
from model_store.store import Store


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options --url, --token and --store, which `shown_token` understands."""
    url = click.option(
        "--url",
        default="http://127.0.0.1:8000",
        envvar="TASKBONE_URL",
        show_default=True,
        show_envvar=True,
        help="Where the server is.",
    )
    token = click.option(
        "--token",
        envvar="TASKBONE_TOKEN",
        show_envvar=True,
        help="A key of the server. [default: for a server on this machine, its store's file token]",
    )
    return url(token(store_option(command)))


def shown_token(url: str, token: str | None, store: Store) -> str | None:
    """The token that was given; else the store's, which is for the server on this machine and
    shown to no other."""
    from serving import client, local_key

    if token is None and client.is_local(url):
        return local_key.local_token(store.folder)
    return token
