"""The documentation: it becomes a site without a warning, and what it quotes is so."""

import ast
import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest
import yaml

from localization.config import TaskConfig
from serving.haproxy import _PAGES as FRONT_DOOR_PAGES
from serving.statuses import STATUSES
from tests.test_project import COMMANDS, PACKAGES, parse

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *DOCS.rglob("*.md"),
        *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
        *ROOT.glob("deploy/README.md"),
    ]
)
GUIDES = [page for page in PAGES if page.parent.name not in ("decisions", "results")]
"""Pages about the version that is here; decisions and results are about their day."""

LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""Which attribute of which element has a browser load something."""


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


class Page(HTMLParser):
    """What a built page loads, where it links to, its anchors, and what its navigation has."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.navigation: list[str] = []
        self._depth = 0
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.anchors.add(given["id"])
        if LOADING.get(tag, "") in given:
            self.loads.append(given[LOADING[tag]])
        if tag == "div" and (self._depth or "sidebar-tree" in given.get("class", "")):
            self._depth += 1
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
            if self._depth:
                self.navigation.append(given["href"])

    def handle_endtag(self, tag: str) -> None:
        """Note its end."""
        if tag == "div" and self._depth:
            self._depth -= 1


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("docs")
    options = "--builder html --fail-on-warning --keep-going --quiet --conf-dir docs".split()
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, "--doctree-dir", folder / "read", ".", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def built(site: Path) -> dict[Path, Page]:
    return {file: Page(file) for file in sorted(site.rglob("*.html"))}


class TestSite:
    def test_make_builds_it_like_this(self) -> None:
        (line,) = re.findall(r"-?m? sphinx (.*)", (ROOT / "Makefile").read_text())
        assert (
            line == "--builder html --fail-on-warning --keep-going --quiet --conf-dir docs . site"
        )

    def test_every_page_is_in_the_navigation(self, site: Path, built: dict[Path, Page]) -> None:
        index = site / "docs" / "index.html"
        listed = {(index.parent / href).resolve() for href in built[index].navigation}
        wanted = {site / page.relative_to(ROOT).with_suffix(".html") for page in PAGES} - {index}
        assert sorted(wanted - listed) == []

    def test_nothing_is_loaded_from_elsewhere(self, site: Path, built: dict[Path, Page]) -> None:
        foreign = [
            (file.name, url)
            for file, page in built.items()
            for url in page.loads
            if urlsplit(url).netloc
        ]
        assert foreign == []
        assert any(page.loads for page in built.values())
        styles = sorted(site.rglob("*.css"))
        assert styles
        for file in styles:
            loaded = re.findall(
                r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""", file.read_text()
            )
            assert [url for pair in loaded for url in pair if urlsplit(url).netloc] == [], file

    def test_every_link_leads_somewhere(self, built: dict[Path, Page]) -> None:
        lost = []
        for file, page in built.items():
            for href in page.links:
                url = urlsplit(href)
                if url.scheme or url.netloc:
                    continue
                target = (file.parent / unquote(url.path)).resolve() if url.path else file
                anchor = unquote(url.fragment)
                known = built[target].anchors if target in built else set()
                if not target.is_file() or (anchor and anchor not in known):
                    lost.append((file.name, href))
        assert lost == []

    def test_the_top_leads_to_the_first_page(self, site: Path) -> None:
        found = re.findall(r"url=([^\"]+)", (site / "index.html").read_text())
        assert found == ["docs/index.html"]
        assert (site / found[0]).is_file()


@pytest.mark.parametrize(
    "file", sorted((DOCS / "pictures").glob("*.svg")), ids=lambda file: file.name
)
def test_pictures_stand_alone(file: Path) -> None:
    """They have a title for who cannot see them, colours for the dark, and load nothing."""
    text = file.read_text(encoding="utf-8")
    root = ET.fromstring(text)  # noqa: S314 - our own file
    title = root.find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert len((title.text or "").split()) > 5
    assert "prefers-color-scheme: dark" in text
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)|href=|@import", text) == []


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    fence = rf"^```(?:{'|'.join(languages)})\n(.*?)^```$"
    return re.findall(fence, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_its_blocks_can_be_read(page: Path) -> None:
    for text in blocks(page, "python"):
        ast.parse(text)
    for text in blocks(page, "yaml"):
        yaml.safe_load(text)
    for text in blocks(page, "sh", "bash"):
        done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, check=False)
        assert done.returncode == 0, (text, done.stderr)


def test_the_guides_task_files_are_valid() -> None:
    found = [
        TaskConfig.model_validate(yaml.safe_load(text))
        for name in ("quickstart.md", "localizing.md")
        for text in blocks(DOCS / name, "yaml")
    ]
    assert [config.task for config in found] == ["mood"] * 3
    for text in blocks(DOCS / "quickstart.md", "json"):
        json.loads(text)


def test_the_recipes_settings_are_valid() -> None:
    """The first table's settings, each row as a task file."""
    table = (DOCS / "localizing.md").read_text().partition("| **recovered**")
    rows = re.findall(r"^\| \*\*(.*?)\*\* \| (.*?) \|", "".join(table[1:]), re.MULTILINE)[:4]
    assert [name for name, _ in rows] == ["recovered", "fast", "localized", "without training"]
    for _, settings in rows:
        given = {"task": "mood", "data": {"train": "train.jsonl"}}
        for setting in re.findall(r"`(.*?)`", settings):
            given |= yaml.safe_load(setting)
        TaskConfig.model_validate(given)


# --- command lines --------------------------------------------------------------------------------


def command_lines(page: Path) -> Iterator[str]:
    """What is typed at a shell, from `taskbone` on, one command each."""
    text = page.read_text(encoding="utf-8")
    typed = "\n".join(blocks(page, "sh", "bash")).replace("\\\n", " ")
    indented = re.findall(r"^ {4}(taskbone .*)$", text, re.MULTILINE)
    for line in [*typed.splitlines(), *indented]:
        if "kubectl" in line:  # whose namespaces are called taskbone, too
            continue
        for command in re.findall(r"""(?:^|[ /("])(taskbone [a-z].*)$""", line.partition(" #")[0]):
            yield command.removesuffix(')"') if "$(taskbone" in line else command


LINES = [(str(page.relative_to(ROOT)), line) for page in GUIDES for line in command_lines(page)]


def test_there_are_command_lines() -> None:
    assert len(LINES) > 12


@pytest.mark.parametrize(("page", "line"), LINES)
def test_command_lines_are_right(page: str, line: str) -> None:
    parse(line)


@pytest.mark.parametrize("page", GUIDES, ids=names(GUIDES))
def test_commands_named_in_the_text_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for span in re.findall(r"`(taskbone [^`]+)`", text):
        try:
            words = shlex.split(span)[1:]
        except ValueError:
            pytest.fail(f"not a command line: {span}")
        command = command_of(words)
        options = {flag for item in command.params for flag in (*item.opts, *item.secondary_opts)}
        options |= {"--help", "-h", "--version"}
        unknown = [
            word for word in words if word.startswith("--") and word.split("=")[0] not in options
        ]
        assert unknown == [], f"{span}: {', '.join(unknown)}"


def command_of(words: list[str]) -> click.Command:
    """The command that words begin with: a whole one or a group."""
    from taskbone import cli

    if not words or words[0].startswith("-") or not words[0].islower():
        return cli
    for count in (2, 1):
        if (found := COMMANDS.get(" ".join(words[:count]))) is not None:
            return found
    pytest.fail(f"no command taskbone {' '.join(words)}")


# --- troubleshooting ------------------------------------------------------------------------------

TROUBLES = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = [
    span
    for cell in re.findall(r"^\| (`.*?`.*?) \| ", TROUBLES, re.MULTILINE)
    for span in re.findall(r"`([^`]+)`", cell)
]
TYPES = {status.type for status in STATUSES.values()} | {
    kind for kind, _ in FRONT_DOOR_PAGES.values()
}


@cache
def spoken() -> str:
    """Every text in the code, one a line; a blank character stands for what is put in."""
    texts = []
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(re.sub(r"%\.?\d*[sdr]", "\0", node.value))
                elif isinstance(node, ast.JoinedStr):
                    texts.append(
                        "".join(
                            part.value
                            if isinstance(part, ast.Constant) and isinstance(part.value, str)
                            else "\0"
                            for part in node.values
                        )
                    )
    return "\n".join(text.replace("\n", " ") for text in texts)


@pytest.mark.parametrize("message", MESSAGES)
def test_troubleshooting_quotes_what_is_said(message: str) -> None:
    if message in TYPES:
        return
    parts = [re.escape(part.strip()) for part in message.split("...")]
    assert re.search("[^\n]*?".join(parts), spoken()), message


def test_troubleshooting_names_every_error_that_an_operator_may_see() -> None:
    shown = {
        "unauthorized": "### 401, 403: keys",
        "not_ready": "the engine does not run",
        "golden_mismatch": "golden_mismatch",
        "wrong_backbone": "wrong_backbone",
        "store_unreachable": "store_unreachable",
        "invalid_signature": "invalid_signature",
    }
    assert shown.keys() <= TYPES
    assert [name for name, text in shown.items() if text not in TROUBLES] == []


def test_what_shows_the_native_forward_runs() -> None:
    (block,) = blocks(DOCS / "troubleshooting.md", "python")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(block, "troubleshooting.md", "exec"), {})  # noqa: S102 - our own page
    assert output.getvalue().startswith("[")
