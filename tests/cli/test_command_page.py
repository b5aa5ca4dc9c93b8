"""`docs/command-line.md` and `--json`: every command is there, as it is, and prints what it says.

The commands that need a server, or compute, are compared with the page where they are tested.
"""

from pathlib import Path

import click
import pytest

from model_store.backbone import Backbone
from model_store.store import Store
from tests.cli.command_page import (
    as_promised,
    commands,
    help_of,
    help_on_page,
    promised,
    sections,
)
from tests.cli.running import run, succeed
from tests.model_store.example_artifacts import example_file
from tests.overlays import random_artifact
from tests.reference import small_checkpoint

ALL = dict(commands())
LEAVES = {name: item for name, item in ALL.items() if not isinstance(item, click.Group)}
WITHOUT_JSON = {"completion", "ray-environment", "node"}
"""The first two print what a shell reads, the last runs until it is stopped."""


def test_every_command_has_its_section() -> None:
    assert set(sections()) == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_its_help_is_the_commands_own(name: str) -> None:
    """To write it again: `python -m tests.cli.command_page`."""
    assert help_on_page(sections()[name]) == help_of(name)


@pytest.mark.parametrize("name", ["", *ALL])
@pytest.mark.parametrize("width", [80, 100])
def test_help_fits_and_nothing_in_a_list_is_cut(name: str, width: int) -> None:
    lines = help_of(name, width).splitlines()
    assert max(map(len, lines)) <= width
    assert [line for line in lines if line.startswith("  ") and line.endswith("...")] == []


@pytest.mark.parametrize("name", LEAVES)
def test_every_command_with_a_result_gives_json_and_the_page_shows_it(name: str) -> None:
    has_json = any("--json" in item.opts for item in LEAVES[name].params)
    assert has_json == (promised(name) is not None) == (name not in WITHOUT_JSON)


def test_commands_of_the_store_print_what_is_promised(store: Store) -> None:
    for note in ("first", "second", "third"):
        store.publish(example_file(note=note))
    with store.staging() as staging:
        (staging / "model.safetensors").write_bytes(b"weights")
        store.add_backbone("ab" * 32, "tiny", staging)

    def store_command(*arguments: str) -> None:
        as_promised(f"store {arguments[0]}", succeed("store", *arguments, "--json"))

    store_command("list")
    store_command("show", "mood")
    store_command("activate", "mood", "1")
    store_command("roll-back", "mood")
    store_command("delete", "mood", "--version", "1", "--yes")
    store_command("delete", "mood", "--yes")
    store_command("gc", "--keep", "0")
    store_command("audit")


def test_commands_of_keys_print_what_is_promised(store: Store) -> None:
    as_promised("keys add", succeed("keys", "add", "shop", "--scope", "predict", "--json"))
    limits = ("--task", "mood", "--expires", "1d")
    as_promised("keys add", succeed("keys", "add", "spam", "--scope", "predict", *limits, "--json"))
    assert len(as_promised("keys list", succeed("keys", "list", "--json"))) == 2
    as_promised("keys rotate", succeed("keys", "rotate", "shop", "--json"))
    as_promised("keys revoke", succeed("keys", "revoke", "shop", "--json"))


def test_commands_that_compute_print_what_is_promised(store: Store, tmp_path: Path) -> None:
    source = str(small_checkpoint(tmp_path / "checkpoint", "bert").folder)
    as_promised("store add-backbone", succeed("store", "add-backbone", source, "--json"))
    as_promised("store verify", succeed("store", "verify", "--json"))


def test_publishing_prints_what_is_promised(
    tiny: tuple[Store, Backbone], store: Store, tmp_path: Path
) -> None:
    with store.staging() as staging:
        there, backbone = tiny
        for file in there.backbone_path(backbone.fingerprint).iterdir():
            (staging / file.name).write_bytes(file.read_bytes())
        store.add_backbone(backbone.fingerprint, "tiny", staging)
    file = tmp_path / "mood.safetensors"
    file.write_bytes(random_artifact(backbone, "mood"))
    as_promised("store publish", succeed("store", "publish", file, "--json"))
    assert as_promised("store verify", succeed("store", "verify", "--json"))[1]["problem"] is None


@pytest.mark.parametrize(
    "arguments", [["store", "show", "mod"], ["keys", "revoke", "x"], ["localize", "nowhere.yaml"]]
)
def test_with_json_an_error_is_one_line_too(store: Store, arguments: list[str]) -> None:
    result = run(*arguments, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
