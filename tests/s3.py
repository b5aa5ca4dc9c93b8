"""The S3 server of `tests/s3_server.py` as a test uses it."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from unittest import mock

BUCKET = "models"
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class S3:
    """A running server with one bucket."""

    url: str
    prefixes: Iterator[int]

    def location(self) -> str:
        """Where a new store can be."""
        return f"s3://{BUCKET}/place{next(self.prefixes)}/store"

    def order(self, path: str, order: object, method: str = "POST") -> None:
        """Have the server do something that S3 does not."""
        data = json.dumps(order).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)  # noqa: S310
        with urllib.request.urlopen(request) as answer:  # noqa: S310 - of this server
            assert answer.status == 200

    def copy(self, source: str, target: str) -> None:
        """Copy all objects from one location to another."""
        prefixes = {
            name: location.removeprefix(f"s3://{BUCKET}/") + "/"
            for name, location in (("source", source), ("target", target))
        }
        self.order("/copy", {"bucket": BUCKET, **prefixes})

    @contextmanager
    def fault(self, kind: str, method: str, path: str, times: int = 1) -> Iterator[None]:
        """Have requests of this method whose path has `path` in it meet a fault."""
        fault = {"kind": kind, "method": method, "path": path, "times": times}
        self.order("/faults", [fault], "PUT")
        try:
            yield
        finally:
            self.order("/faults", [], "PUT")

    @contextmanager
    def checked_keys(self) -> Iterator[None]:
        """Have the server refuse access keys that it does not know, which are all."""
        self._check_after(0)
        try:
            yield
        finally:
            self._check_after(10**12)

    def _check_after(self, requests: int) -> None:
        self.order("/moto-api/reset-auth", requests)


@contextmanager
def running_s3() -> Iterator[S3]:
    """A server, with the environment such that stores below `s3://` are there."""
    from s3fs import S3FileSystem

    command = [sys.executable, "-m", "tests.s3_server"]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{int(process.stdout.readline())}"
            changes = {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "someone",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "AWS_CONFIG_FILE": "/nowhere",
                "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
            }
            with mock.patch.dict(os.environ, changes):
                os.environ.pop("AWS_PROFILE", None)
                S3FileSystem.clear_instance_cache()
                S3FileSystem().mkdir(BUCKET)
                yield S3(url, count())
                S3FileSystem.clear_instance_cache()
        finally:
            process.kill()
