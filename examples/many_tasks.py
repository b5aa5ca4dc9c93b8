"""Asks all tasks of a running server about one text, in one request.

python examples/many_tasks.py "A warm, funny film." --url http://127.0.0.1:8000 --key KEY
"""

import argparse
import os

import httpx


def main() -> None:
    """Ask, and print a line for each task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is")
    parser.add_argument(
        "--key", default=os.environ.get("TASKBONE_TOKEN", ""), help="one that may predict"
    )
    arguments = parser.parse_args()

    with httpx.Client(
        base_url=arguments.url, headers={"Authorization": f"Bearer {arguments.key}"}, timeout=30
    ) as server:
        # "*": all tasks that take a single text. The server puts them into one batch.
        answer = server.post("/v1/predict", json={"tasks": "*", "inputs": arguments.text})
    if answer.is_error:
        raise SystemExit(answer.json()["error"]["message"])
    body = answer.json()
    for task, result in sorted(body["results"].items()):
        # One task that cannot answer does not spoil the others' answers.
        if "error" in result:
            print(f"{task:12} {result['error']['message']}")
            continue
        best = result["predictions"][0]
        print(f"{task:12} {best['label']:30} {best['score']:.3f}")
    print(f"{len(body['results'])} tasks in {body['timings_ms']['total_ms']:.1f} ms")


if __name__ == "__main__":
    main()
