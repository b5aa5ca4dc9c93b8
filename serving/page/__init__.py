"""The live page's files: plain HTML, CSS and JavaScript modules, without a build step.

They hold no data: all that the page shows comes from routes that need a key. This list alone says
which files there are, so that no name that a client sends becomes a path.
"""

from pathlib import Path

INDEX = "index.html"
"""What the route `/` gives."""

FILES = {
    "page.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **dict.fromkeys(
        (
            "artifact.js",
            "bitmap.js",
            "chart.js",
            "elements.js",
            "figures.js",
            "history.js",
            "key.js",
            "neurons.js",
            "numbers.js",
            "page.js",
            "quantiles.js",
            "registration.js",
            "server.js",
            "tasks.js",
            "trial.js",
        ),
        "text/javascript; charset=utf-8",
    ),
}
"""What the route `/page/{file}` gives: names, with their content types."""

PATHS = frozenset(("/", *(f"/page/{name}" for name in FILES)))
"""The paths that are answered without a key."""


def read(name: str) -> bytes:
    """One of the files."""
    assert name == INDEX or name in FILES
    return (Path(__file__).parent / name).read_bytes()
