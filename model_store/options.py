"""Options that the commands of all packages share, and what a shell completes of the store."""

import click
from click.shell_completion import CompletionItem

from model_store.errors import ModelStoreError
from model_store.store import STORE_VARIABLE, Store, open_store


def _as_store(context: click.Context, parameter: click.Parameter, value: str) -> Store:
    return open_store(value)


store_option = click.option(
    "--store",
    callback=_as_store,
    metavar="FOLDER|URL",
    envvar=STORE_VARIABLE,
    default="~/.taskbone",
    show_default=True,
    show_envvar=True,
    help="The store's folder, or a URL such as s3://bucket/prefix.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")


def folder_store(context: click.Context) -> Store | None:
    """The store that a half-typed command line names, for completing what is in it.

    None for one in an object store: a shell does not wait for a network.
    """
    given = context.params.get("store")
    store = given if isinstance(given, Store) else None
    return store if store is not None and store.folder is not None else None


def complete_tasks(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The store's tasks that begin with what was typed; none where it cannot be read."""
    store = folder_store(context)
    try:
        names = store.task_names() if store else []
    except ModelStoreError:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
