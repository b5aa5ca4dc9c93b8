"""The live page as files: who gets them, with which headers, and what they may not do."""

import json
import re
from pathlib import Path

import pytest

from serving import page
from tests.serving.conftest import Served
from tests.serving.test_api import error_of

FOLDER = Path(page.__file__).parent
CODE = [name for name in page.FILES if name.endswith(".js")]


def test_the_list_names_every_file_and_no_other() -> None:
    there = {file.name for file in FOLDER.iterdir() if file.suffix not in (".py", "")}
    assert there == {page.INDEX, *page.FILES}


@pytest.mark.parametrize("path", sorted(page.PATHS))
@pytest.mark.parametrize("token", [None, "wrong"])
def test_the_page_needs_no_key_and_lets_nothing_else_in(
    served: Served, path: str, token: str | None
) -> None:
    answer = served.ask("GET", path, token=token)
    assert answer.status_code == 200
    name = path.removeprefix("/page/").strip("/") or page.INDEX
    assert answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["content-type"] == page.FILES.get(name, "text/html; charset=utf-8")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = dict(
        part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert {policy[kind] for kind in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"


def test_a_head_request_gives_the_same_headers(served: Served) -> None:
    got, head = (served.ask(method, "/page/page.js", token=None) for method in ("GET", "HEAD"))
    assert head.content == b""
    assert {**head.headers, "x-request-id": ""} == {**got.headers, "x-request-id": ""}


def test_what_a_browser_has_already_is_not_sent_again(served: Served) -> None:
    first = served.ask("GET", "/", token=None)
    assert first.headers["cache-control"] == "no-cache"
    etag = first.headers["etag"]
    for known in (etag, f'"other", W/{etag}'):
        again = served.ask("GET", "/", token=None, headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == etag
    other = served.ask("GET", "/page/page.css", token=None, headers={"if-none-match": etag})
    assert other.status_code == 200


@pytest.mark.parametrize("name", ["index.html", "__init__.py", "%2e%2e%2fguard.py", "page.js%00"])
def test_no_name_becomes_a_path(served: Served, name: str) -> None:
    error_of(served.ask("GET", f"/page/{name}", token=None), 401)
    error_of(served.ask("GET", f"/page/{name}"), 404)


def test_the_files_hold_no_inline_code_and_no_address_of_elsewhere() -> None:
    html = (FOLDER / page.INDEX).read_text()
    assert re.findall(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", html) == []
    for name in (page.INDEX, *page.FILES):
        text = (FOLDER / name).read_text()
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name


@pytest.mark.parametrize("name", CODE)
def test_no_text_is_ever_read_as_html(name: str) -> None:
    text = (FOLDER / name).read_text()
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|Function\("
    )
    assert re.findall(forbidden, text) == []


def test_every_module_says_what_it_is_and_every_import_leads_to_one() -> None:
    for name in CODE:
        text = (FOLDER / name).read_text()
        assert text.startswith("// "), name
        assert set(re.findall(r'from "\./([^"]+)"', text)) <= set(CODE), name


def test_the_shell_is_the_same_for_every_server(served: Served) -> None:
    texts = [served.ask("GET", path, token=None).text for path in sorted(page.PATHS)]
    for info in served.service.tasks():
        assert not any(
            json.dumps(info.digest) in text or info.description in text for text in texts
        )
