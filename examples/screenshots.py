"""Takes the pictures of the live page that the documentation shows: the ready-made tasks under a
little load, in Debian's Chromium.

python examples/screenshots.py [FOLDER]
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Literal

import httpx
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from examples.demo import QUESTIONS, end, wait_until_ready  # noqa: E402 - found through the line above
from examples.ready_made import BACKBONE, prepare  # noqa: E402
from model_store.store import Store  # noqa: E402
from serving.local_key import local_token  # noqa: E402

PORT = int(os.environ.get("TASKBONE_PORT", "8765"))
LOOKED_AT_S = 45
"""How long the page looks at the server before its figures are drawn."""
MOST_BYTES = 200_000
Light = Literal["light", "dark"]
LOOKS: tuple[tuple[str, int, int, Light], ...] = (
    ("page", 1200, 860, "light"),
    ("page-dark", 1200, 860, "dark"),
    ("page-phone", 390, 844, "light"),
)
"""Each picture's name, size of the window, and whether it is light or dark."""


def main(folder: Path) -> int:
    """Serve, ask, look."""
    browser = shutil.which("chromium")
    if browser is None:
        sys.exit("No Chromium is here. Install it, on Debian with: apt-get install chromium")
    folder.mkdir(parents=True, exist_ok=True)
    with serving() as (address, token), load(address, token), sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        pages = {}
        for name, width, height, light in LOOKS:
            context = started.new_context(
                viewport={"width": width, "height": height}, color_scheme=light
            )
            pages[name] = context.new_page()
            pages[name].goto(f"{address}/#token={token}")
        time.sleep(LOOKED_AT_S)
        for name, page in pages.items():
            take(page, folder, name)
        started.close()
    for picture in sorted(folder.glob("page*.png")):
        print(f"{picture}: {picture.stat().st_size // 1000} KB")
        assert picture.stat().st_size < MOST_BYTES, f"{picture} is too large"
    return 0


@contextmanager
def serving() -> Iterator[tuple[str, str]]:
    """The ready-made tasks, served from a store of their own; gives the address and a key."""
    with tempfile.TemporaryDirectory(prefix="taskbone-pictures-") as folder:
        prepare(Store(Path(folder)))
        command = ["serve", "--store", folder, "--port", str(PORT), "--backbone", BACKBONE]
        server = subprocess.Popen(
            [sys.executable, "-m", "taskbone", *command], cwd=ROOT, start_new_session=True
        )
        try:
            if not wait_until_ready(server, PORT):
                sys.exit("The server has ended; what it printed says why.")
            yield f"http://127.0.0.1:{PORT}", local_token(Path(folder)) or ""
        finally:
            if server.poll() is None:
                end(server)


@contextmanager
def load(address: str, token: str) -> Iterator[None]:
    """Ask every task its question again and again, a few times a second."""
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(headers={"Authorization": f"Bearer {token}"}) as client:
            for turn in count():
                for place, (task, question) in enumerate(QUESTIONS.items()):
                    if turn % (1 + place % 4):
                        continue  # some tasks are asked less often
                    inputs = question if isinstance(question, str) else [question]
                    client.post(f"{address}/v1/tasks/{task}/predict", json={"inputs": inputs})
                    if over.wait(0.01 * (1 + turn % 7)):
                        return

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join()


def take(page: Page, folder: Path, name: str) -> None:
    """Let the page fill, use it as a visitor would, and take its pictures."""
    page.locator("#trial button").click()
    page.locator(".answer").first.wait_for()
    page.screenshot(path=folder / f"{name}.png")
    if name != "page":
        return
    page.get_by_role("button", name="sst2", exact=True).first.click()
    page.locator("#neurons-other").select_option("imdb")
    page.locator("#neurons-legend", has_text="only imdb").wait_for()
    for part in ("tasks", "detail", "neurons"):
        page.locator(f"#{part}").screenshot(path=folder / f"{name}-{part}.png")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "pictures"))
