"""What `GET /v1/stats` answers, made up: counters that a test moves, in the real ones' shape."""

import json
from bisect import bisect_left
from typing import Any

from playwright.sync_api import Route

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
PARTS = ("latency", "tokenize", "queue", "forward")


class FakeStats:
    """Counters of some tasks. Each answer is taken two seconds after the one before."""

    def __init__(self, *tasks: str) -> None:
        self.at = 1_800_000_000.0
        self.node = "one"
        self.status = 200
        self.replicas_ready = 2
        self.rejected = {"overloaded": 5}
        self.tasks: dict[str, dict[str, Any]] = {}
        for task in tasks:
            self.restart(task)

    def restart(self, task: str) -> None:
        """The task's counters begin anew."""
        self.tasks[task] = {
            "version": 1,
            "overlay_bytes": 61_000,
            "requests": {"200": 0},
            **{part: {"counts": [0] * (len(BOUNDS) + 1), "sum_s": 0.0} for part in PARTS},
        }

    def count(self, task: str, latency_s: float, times: int = 1, code: str = "200") -> None:
        """Requests that took so long: a tenth for tokens, a fifth waiting, half in the network."""
        counters = self.tasks[task]
        counters["requests"][code] = counters["requests"].get(code, 0) + times
        for part, share in zip(PARTS, (1.0, 0.1, 0.2, 0.5), strict=True):
            seconds = share * latency_s
            counters[part]["counts"][bisect_left(BOUNDS, seconds)] += times
            counters[part]["sum_s"] += times * seconds

    def body(self) -> dict[str, Any]:
        """The next answer."""
        self.at += 2
        return {
            "node": self.node,
            "at": self.at,
            "replicas": 2,
            "replicas_ready": self.replicas_ready,
            "queued_tokens": 40,
            "memory_bytes": 512_000_000,
            "backbone": {"name": "tiny", "fingerprint": "0" * 64, "bytes": 90_000_000},
            "plan_cache": {"bytes": 1, "hit": 3, "miss": 1, "build": 1, "evict": 0},
            "rejected": self.rejected,
            "bounds_s": list(BOUNDS),
            "tasks": self.tasks,
        }

    def answer(self, route: Route) -> None:
        """In place of the server's."""
        if self.status == 200:
            route.fulfill(body=json.dumps(self.body()), content_type="application/json")
            return
        error = {"type": "forbidden", "message": "this route needs 'metrics'", "request_id": "1"}
        route.fulfill(status=self.status, json={"error": error})
