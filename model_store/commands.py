"""The `taskbone store` commands: the group, and those that look; those that change what is there
are in `change_commands.py`.

Imports inside a command what only that one needs, so that listing a store loads no torch.
"""

import click

from model_store.change_commands import COMMANDS, figures
from model_store.manifest import Manifest, read_header
from model_store.options import complete_tasks, json_option, store_option
from model_store.store import Store, VersionInfo
from model_store.tables import shortened, show_json, show_table, size


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


@store_commands.command("show", short_help="Show a task's versions, and what one says of itself.")
@click.argument("task", shell_complete=complete_tasks)
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


@store_commands.command("audit", short_help="Show who changed what, and with what result.")
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


@store_commands.command("verify", short_help="Check every backbone and every version.")
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


def role(info: VersionInfo) -> str:
    """What a version does for its task, as a table cell."""
    if info.active:
        return "*"
    parts = [f"canary {info.canary:g} %"] if info.canary else []
    return ", ".join([*parts, "shadow"] if info.shadow else parts)


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


for command in COMMANDS:
    store_commands.add_command(command)
