"""The `taskbone store` commands, and the options that other commands share with them.

Imports inside a command what only that one needs, so that listing a store loads no torch.
"""

import getpass
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import click

from model_store.audit import AuditEntry
from model_store.errors import ModelStoreError, StoreError
from model_store.manifest import Manifest, read_header
from model_store.store import STORE_VARIABLE, Store, VersionInfo, open_store
from model_store.tables import shortened, show_json, show_table, size, working

Changed = TypeVar("Changed")


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


@click.group("store")
def store_commands() -> None:
    """Look into the store and change what is in it.

    Every change is atomic: a running server, and a crash at any moment, see the old state or the
    new one. A running server takes up changes with its next request.

    \b
    Example:
        taskbone store list
    """


@store_commands.command("list")
@store_option
@json_option
def store_list(store: Store, as_json: bool) -> None:
    """List the backbones, and the tasks with their active versions.

    \b
    Example:
        taskbone store list --store /srv/taskbone
    """
    backbones = store.backbones()
    tasks = [store.versions(name) for name in store.task_names()]
    if as_json:
        found = [vars(info) for versions in tasks for info in versions]
        show_json({"backbones": [vars(info) for info in backbones], "tasks": found})
        return
    if not backbones and not tasks:
        click.echo(
            f"The store {store.location} is empty. Begin with: taskbone store add-backbone SOURCE"
        )
        return
    show_table(
        f"Backbones in {store.location}",
        ("name", "fingerprint", "size"),
        ((info.name, info.fingerprint[:12], size(info.bytes)) for info in backbones),
    )
    rows = []
    for versions in tasks:
        active = next((info for info in versions if info.active), None)
        last = (str(active.version), *figures(active)) if active else ("none", "", "", "")
        rows.append((versions[0].task, str(len(versions)), *last))
    heads = ("task", "versions", "active", "digest", "published", "size")
    show_table("Tasks", heads, rows)


@store_commands.command("add-backbone")
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
        taskbone store add-backbone sentence-transformers/all-MiniLM-L6-v2 --name minilm
    """
    from model_store.backbone import import_checkpoint

    with working(f"Taking in {source}"):
        info = import_checkpoint(source, store, name)
    if as_json:
        show_json(vars(info))
    else:
        click.echo(f"Backbone {info.name}: {info.fingerprint[:12]}, {size(info.bytes)}")


@store_commands.command("publish")
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
        taskbone store publish mood.safetensors --signature mood.sig --signature-key team.pub
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


@store_commands.command("show")
@click.argument("task")
@click.option("--version", type=int, help="The version to show. [default: the active one]")
@store_option
@json_option
def store_show(task: str, version: int | None, store: Store, as_json: bool) -> None:
    """Show a task's versions, and what one of them says about itself.

    \b
    Example:
        taskbone store show sst2 --version 2
    """
    versions = store.versions(task)
    info, data = store.read(task, version)
    manifest = read_header(data)[0]
    if as_json:
        show_json(
            {
                "versions": [vars(known) for known in versions],
                "version": info.version,
                "manifest": manifest.model_dump(mode="json"),
            }
        )
        return
    rows = ((role(known), str(known.version), *figures(known)) for known in versions)
    show_table(f"Versions of {task}", ("active", "version", "digest", "published", "size"), rows)
    show_manifest(info, manifest)


@store_commands.command("activate")
@click.argument("task")
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


@store_commands.command("roll-back")
@click.argument("task")
@store_option
@json_option
def store_roll_back(task: str, store: Store, as_json: bool) -> None:
    """Make the version of TASK active that was so before; again goes one further.

    \b
    Example:
        taskbone store roll-back sst2
    """
    show_change(noted(store, "rollback", task, partial(store.roll_back, task)), as_json)


@store_commands.command("delete")
@click.argument("task")
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


@store_commands.command("audit")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="How many entries, counted from the newest.",
)
@store_option
@json_option
def store_audit(limit: int, store: Store, as_json: bool) -> None:
    """Show who changed what in the store, and with what result; the newest last.

    \b
    Example:
        taskbone store audit --limit 100
    """
    entries = store.audit(limit)
    if as_json:
        show_json([entry.model_dump() for entry in entries])
        return
    rows = (
        (
            *(entry.at[:19].replace("T", " "), entry.by, entry.action, entry.task),
            *(str(entry.version or ""), (entry.digest or "")[:12]),
            shortened(f"{entry.result}: {entry.message}" if entry.message else entry.result, 120),
        )
        for entry in entries
    )
    heads = ("at (UTC)", "by", "action", "task", "version", "digest", "result")
    show_table(f"Changes in {store.location}", heads, rows)


@store_commands.command("verify")
@store_option
@json_option
def store_verify(store: Store, as_json: bool) -> None:
    """Check every backbone and every version in the store; exit status 1 when one is damaged.

    \b
    Example:
        taskbone store verify --json
    """
    from model_store.verification import check_store

    findings = []
    for finding in check_store(store):
        findings.append(finding)
        if not as_json:
            click.echo(f"{finding.name}: {finding.problem or 'good'}")
    if as_json:
        show_json([vars(finding) for finding in findings])
    if any(finding.problem for finding in findings):
        raise click.exceptions.Exit(1)


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


def role(info: VersionInfo) -> str:
    """What a version does for its task, as a table cell."""
    if info.active:
        return "*"
    parts = [f"canary {info.canary:g} %"] if info.canary else []
    return ", ".join([*parts, "shadow"] if info.shadow else parts)


def show_change(info: VersionInfo, as_json: bool) -> None:
    """Print which version is active now."""
    if as_json:
        show_json(vars(info))
    else:
        click.echo(f"{info.task}: version {info.version} is active")


def show_manifest(info: VersionInfo, manifest: Manifest) -> None:
    """Print what a version says about itself: what it is, and its measured figures."""
    rows = [
        ("description", manifest.description or "none"),
        ("labels", shortened(", ".join(manifest.labels), 120)),
        ("template", " / ".join(manifest.template)),
        ("backbone", f"{manifest.backbone.name} ({manifest.backbone.fingerprint[:12]})"),
        ("neurons kept", f"{manifest.kept_share:.1%} of the feed-forward neurons"),
        ("prompt", f"{manifest.prompt.tokens} tokens"),
        ("head", manifest.head.kind),
        ("digest", info.digest),
        ("made", f"{manifest.provenance.created} by {manifest.provenance.command}"),
    ]
    show_table(f"Version {info.version}", ("", ""), rows)
    measured = [
        (item.network, item.split, item.metric, f"{item.value:.1%}", str(item.rows))
        for item in manifest.metrics
    ]
    if measured:
        show_table("Measured", ("network", "split", "metric", "value", "rows"), measured)


def figures(info: VersionInfo) -> tuple[str, str, str]:
    """Digest, time and size of a version, as table cells."""
    return info.digest[:12], info.published_at[:16].replace("T", " "), size(info.bytes)
