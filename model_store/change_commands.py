"""The `taskbone store` commands that change what is there, each noted in the audit log."""

import getpass
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import click

from model_store.audit import AuditEntry
from model_store.errors import ModelStoreError, StoreError
from model_store.garbage import UNDER_WAY_S, Garbage, Rule, collect, look
from model_store.options import complete_tasks, json_option, store_option
from model_store.store import Store, VersionInfo
from model_store.tables import show_json, show_table, size, working

Changed = TypeVar("Changed")


@click.command("add-backbone")
@click.argument("source")
@click.option("--name", help="What to call it. [default: the id, or the folder's name]")
@store_option
@json_option
def store_add_backbone(source: str, name: str | None, store: Store, as_json: bool) -> None:
    """Put a Hugging Face checkpoint into the store, once.

    SOURCE is a folder, or an id of the Hugging Face hub. BERT, RoBERTa, XLM-RoBERTa, DistilBERT
    and ELECTRA are read, from safetensors files alone.

    \b
    Example:
        taskbone store add-backbone sentence-transformers/all-MiniLM-L6-v2
    """
    from model_store.backbone import import_checkpoint

    with working(f"Taking in {source}"):
        info = import_checkpoint(source, store, name)
    if as_json:
        show_json(vars(info))
    else:
        click.echo(f"Backbone {info.name}: {info.fingerprint[:12]}, {size(info.bytes)}")


@click.command("publish", short_help="Check artifact files, and publish each.")
@click.argument(
    "files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "--activate/--no-activate",
    default=True,
    show_default=True,
    help="Whether to make the new versions the active ones.",
)
@click.option(
    "--signature",
    "signatures",
    multiple=True,
    metavar="FILE.sig",
    type=click.Path(path_type=Path),
    help="The signature of FILE; once for each, in the same order.",
)
@click.option(
    "--signature-key",
    envvar="TASKBONE_SIGNATURE_KEY",
    show_envvar=True,
    metavar="KEY.pub",
    type=click.Path(path_type=Path),
    help="Public key with which every FILE must be signed.  [default: none need be]",
)
@store_option
@json_option
def store_publish(
    files: tuple[Path, ...],
    activate: bool,
    signatures: tuple[Path, ...],
    signature_key: Path | None,
    store: Store,
    as_json: bool,
) -> None:
    """Check artifact files and publish each as its task's next version.

    All files are checked before the first is published: format, tensors, backbone, and whether
    their golden inputs give the promised answers here. The same file again changes nothing.

    \b
    Examples:
        taskbone store publish examples/overlays/*.safetensors
        taskbone store publish a.safetensors --signature a.sig --signature-key k
    """
    from model_store.verification import check_file, check_signatures

    if signatures and signature_key is None:
        raise click.UsageError("--signature needs --signature-key, the key to check it with")
    if signature_key is not None:
        check_signatures(files, signatures, signature_key)
    checked = []
    for file in files:
        with working(f"Checking {file.name}"):
            checked.append(check_file(file, store))
    infos = []
    for artifact in checked:
        change = partial(store.publish, artifact, activate=activate)
        task, digest = artifact.manifest.task, artifact.digest
        infos.append(noted(store, "register", task, change, digest=digest))
    if as_json:
        show_json([vars(info) for info in infos])
    for info in infos if not as_json else ():
        click.echo(f"{info.task}: version {info.version}{' (active)' if info.active else ''}")


@click.command("activate")
@click.argument("task", shell_complete=complete_tasks)
@click.argument("version", type=int)
@store_option
@json_option
def store_activate(task: str, version: int, store: Store, as_json: bool) -> None:
    """Make VERSION the one that answers for TASK.

    \b
    Example:
        taskbone store activate sst2 3
    """
    change = partial(store.activate, task, version)
    show_change(noted(store, "activate", task, change, version=version), as_json)


@click.command("roll-back", short_help="Make the version active that was so before.")
@click.argument("task", shell_complete=complete_tasks)
@store_option
@json_option
def store_roll_back(task: str, store: Store, as_json: bool) -> None:
    """Make the version of TASK active that was so before; again goes one further.

    \b
    Example:
        taskbone store roll-back sst2
    """
    show_change(noted(store, "rollback", task, partial(store.roll_back, task)), as_json)


@click.command("delete")
@click.argument("task", shell_complete=complete_tasks)
@click.option("--version", type=int, help="Delete this version alone; it must not be active.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@store_option
@json_option
def store_delete(task: str, version: int | None, yes: bool, store: Store, as_json: bool) -> None:
    """Delete a version of TASK, or the task with all its versions. They cannot be brought back.

    \b
    Example:
        taskbone store delete sst2 --version 1
    """
    what = (
        f"task {task!r} with all its versions" if version is None else f"{task!r} version {version}"
    )
    if not yes:
        click.confirm(f"Delete {what} from {store.location}?", abort=True, err=True)
    noted(store, "delete", task, partial(store.delete, task, version), version=version)
    if as_json:
        show_json({"deleted": {"task": task, "version": version}})
    else:
        click.echo(f"Deleted {what}.")


@click.command("gc")
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    metavar="N",
    help="So many of the newest versions of each task stay.",
)
@click.option("--backbones", is_flag=True, help="Delete backbones, too, that no version is for.")
@click.option("--yes", is_flag=True, help="Delete; without it only show what would be.")
@store_option
@json_option
def store_gc(keep: int, backbones: bool, yes: bool, store: Store, as_json: bool) -> None:
    """Show what nothing needs, or delete it with --yes. It cannot be brought back.

    That is: versions beyond the newest N of their task, unless they are active, a canary, a shadow,
    or what rolling back would go to; and what was left by commands and servers that were killed
    while they wrote. What was published or written in the last hour stays. A running server takes
    it up; versions that are gone can no longer be asked for by number.

    \b
    Examples:
        taskbone store gc
        taskbone store gc --keep 1 --yes
    """
    rule = Rule(keep, time.time() - UNDER_WAY_S, backbones)
    with working(f"Looking through {store.location}"):
        garbage = collect(store, rule) if yes else look(store, rule)
    if yes:
        note_garbage(store, garbage)
    if as_json:
        names = ("versions", "backbones", "leftovers")
        found = {name: [vars(item) for item in getattr(garbage, name)] for name in names}
        show_json({"deleted": yes, "bytes": garbage.bytes, **found})
    else:
        show_garbage(garbage, yes)


def note_garbage(store: Store, garbage: Garbage) -> None:
    """Note in the audit log what was deleted: one entry for each task, and for each backbone."""
    entry = AuditEntry(by=command_line_user(), action="gc", task="")
    for task, versions in groupby(garbage.versions, lambda info: info.task):
        message = f"versions {', '.join(str(info.version) for info in versions)}"
        store.append_audit(entry.model_copy(update={"task": task, "message": message}))
    for info in garbage.backbones:
        message = f"backbone {info.name} ({info.fingerprint[:12]})"
        store.append_audit(entry.model_copy(update={"message": message}))


def show_garbage(garbage: Garbage, deleted: bool) -> None:
    """Print what was deleted, or would be."""
    parts: list[tuple[str, tuple[str, ...], Iterable[tuple[str, ...]]]] = [
        (
            "Versions",
            ("task", "version", "digest", "published", "size"),
            [(info.task, str(info.version), *figures(info)) for info in garbage.versions],
        ),
        (
            "Backbones",
            ("name", "fingerprint", "size"),
            [(info.name, info.fingerprint[:12], size(info.bytes)) for info in garbage.backbones],
        ),
        (
            "Left by killed writers",
            ("name", "size"),
            [(item.name, size(item.bytes)) for item in garbage.leftovers],
        ),
    ]
    for title, heads, rows in parts:
        if rows:
            show_table(title, heads, rows)
    if not (garbage.versions or garbage.backbones or garbage.leftovers):
        click.echo("Nothing to delete.")
    elif deleted:
        click.echo(f"Deleted {size(garbage.bytes)}.")
    else:
        click.echo(f"Would delete {size(garbage.bytes)}. To delete it, add --yes.")


def command_line_user() -> str:
    """Who changes the store from here, as the audit log names them."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        name = f"user {os.getuid()}"
    return f"{name}@command line"


def noted(
    store: Store,
    action: str,
    task: str,
    change: Callable[[], Changed],
    *,
    version: int | None = None,
    digest: str | None = None,
) -> Changed:
    """Make a change of the store and note it in the audit log, done or refused."""
    by = command_line_user()
    entry = AuditEntry(by=by, action=action, task=task, version=version, digest=digest)
    try:
        changed = change()
    except ModelStoreError as error:
        refused = {"result": type(error).__name__, "message": str(error)}
        with suppress(StoreError):  # the first error is the one to show
            store.append_audit(entry.model_copy(update=refused))
        raise
    if isinstance(changed, VersionInfo):
        entry = entry.model_copy(update={"version": changed.version, "digest": changed.digest})
    store.append_audit(entry)
    return changed


def show_change(info: VersionInfo, as_json: bool) -> None:
    """Print which version is active now."""
    if as_json:
        show_json(vars(info))
    else:
        click.echo(f"{info.task}: version {info.version} is active")


def figures(info: VersionInfo) -> tuple[str, str, str]:
    """Digest, time and size of a version, as table cells."""
    return info.digest[:12], info.published_at[:16].replace("T", " "), size(info.bytes)


COMMANDS = (
    *(store_add_backbone, store_publish, store_activate, store_roll_back),
    *(store_delete, store_gc),
)
