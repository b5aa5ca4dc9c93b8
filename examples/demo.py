"""Serves the ready-made tasks from one backbone and shows them answering, until Ctrl-C.

python examples/demo.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from examples.ready_made import BACKBONE, prepare  # noqa: E402 - found through the line above
from model_store.store import Store  # noqa: E402
from serving.local_key import local_token  # noqa: E402

# One input of our own per ready-made task; a pair for tasks that compare two texts.
QUESTIONS: dict[str, str | list[str]] = {
    "sst2": "A warm, funny film that I did not want to end.",
    "agnews": "The central bank raised interest rates for the third time this year.",
    "trec6": "Who built the first bridge over the river ?",
    "sms_spam": "Congratulations! You have won a cruise. Reply YES to claim your prize now.",
    "banking77": "The machine kept my card, what shall I do?",
    "imdb": "I watched it twice in one week, and it made me laugh both times. Go and see it.",
    "cola": "The letter was by the postman yesterday bring.",
    "cb": ["I hope that the shop opens on Friday.", "the shop opens on Friday"],
    "rte": ["The shop in Oak Street opened on Friday with music.", "A shop opened in Oak Street."],
    "qnli": ["When does the shop open?", "The shop in Oak Street opens at nine on weekdays."],
    "mrpc": ["The shop will open at nine on Friday .", "On Friday , the shop opens at nine ."],
}


def main() -> int:
    """Prepare, serve, ask, wait."""
    console = Console()
    folder = Path(os.environ.get("TASKBONE_STORE", ROOT / ".taskbone")).expanduser().resolve()
    port = int(os.environ.get("TASKBONE_PORT", "8000"))
    with console.status("Preparing the store: one backbone, and the ready-made tasks ..."):
        names = prepare(Store(folder))
    command = ["serve", "--store", str(folder), "--port", str(port), "--backbone", BACKBONE]
    command.append("--no-access-log")  # whose lines would stand between those of the table
    # In a session of its own, so that a signal reaches it through us, once, from wherever it comes.
    server = subprocess.Popen(
        [sys.executable, "-m", "taskbone", *command], cwd=ROOT, start_new_session=True
    )
    for kind in (signal.SIGINT, signal.SIGTERM):  # also where a shell has us ignore them
        signal.signal(kind, signal.default_int_handler)
    try:
        if wait_until_ready(server, port):
            token = local_token(folder) or ""
            show_answers(console, port, token, names)
            show_page(console, port, token)
            console.print("Ctrl-C stops the server.")
        return server.wait()
    except KeyboardInterrupt:
        return end(server)
    finally:
        if server.poll() is None:
            end(server)


def wait_until_ready(server: "subprocess.Popen[bytes]", port: int) -> bool:
    """Whether the server is ready; False once it has ended."""
    while server.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200:
                # Its own first lines come before ours.
                time.sleep(1)
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    return False


def show_answers(console: Console, port: int, token: str, names: list[str]) -> None:
    """Ask every ready-made task its question, and print the answers as a table."""
    table = Table(title="Every task, answered from one backbone in one process")
    for column in ("task", "input", "answer"):
        table.add_column(column)
    table.add_column("score", justify="right")
    table.add_column("ms", justify="right")
    for name in names:
        question = QUESTIONS.get(name)
        if question is None:
            continue
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/tasks/{name}/predict",
            json={"inputs": question if isinstance(question, str) else [question]},
            headers={"Authorization": f"Bearer {token}"},
            timeout=30,
        )
        answer.raise_for_status()
        body = answer.json()
        best = body["predictions"][0]
        shown = question if isinstance(question, str) else " / ".join(question)
        table.add_row(
            name,
            shown,
            best["label"],
            f"{best['score']:.2f}",
            f"{body['timings_ms']['total_ms']:.1f}",
        )
    console.print(table)


def show_page(console: Console, port: int, token: str) -> None:
    """Where to see all that in the browser. What is behind `#` stays there."""
    address = f"http://127.0.0.1:{port}/" + (f"#token={token}" if token else "")
    console.print("\nSee it live, and try texts of your own:", style="bold")
    console.print(address, markup=False, soft_wrap=True, highlight=False)


def end(server: "subprocess.Popen[bytes]") -> int:
    """Stop the server, passing every further Ctrl-C on to it; gives its exit status."""
    while True:
        server.send_signal(signal.SIGINT)
        try:
            return server.wait()
        except KeyboardInterrupt:
            continue


if __name__ == "__main__":
    sys.exit(main())
