"""A value in an object store that many may change, by numbered objects that are each created once.

The newest number is the value. To change it is to create the next number: who finds it taken has
lost the race and starts again from the newer value. Nothing but exclusive creation is needed, no
lock and no clock.

Old numbers are removed, but never the newest `KEPT` ones. So whoever has created number n and sees
no number beyond n + KEPT knows that n had never been there before, and that everything since is
built upon it.
"""

import random
import time
from uuid import uuid4

from model_store.bucket import Bucket
from model_store.errors import StoreError

KEPT = 32
TRIES = 100


class Generations:
    """The value whose numbered objects lie in `folder`.

    Each object is a line with a word that only its maker knows, and then the value.
    """

    def __init__(self, bucket: Bucket, folder: str) -> None:
        self._bucket = bucket
        self._folder = folder

    def newest(self) -> int:
        """The newest number, 0 where there is no value. One request."""
        return max(self._numbers(), default=0)

    def read(self) -> tuple[int, bytes | None]:
        """The newest number, and the value."""
        seen = 0
        while (number := self.newest()) > seen:
            content = self._bucket.get(self.name(number))
            if content is not None:
                return number, content.partition(b"\n")[2]
            seen = number  # it may have become old, and was removed, between our two requests
        if not number:
            return 0, None
        raise StoreError(
            f"{self._bucket.location}/{self.name(number)}: is listed and cannot be read"
        )

    def append(self, number: int, value: bytes) -> bool:
        """Make this the value, if `number` is the next one; False where another was faster.

        Raises `StoreError` where so much has happened meanwhile that nobody can tell.
        """
        word = uuid4().hex.encode()
        for attempt in range(TRIES):
            if self._bucket.create(self.name(number), word + b"\n" + value):
                return self._settled(number)
            there = self._bucket.get(self.name(number))
            if there is not None:
                # Ours where the answer to a request was lost and it was sent again.
                return there.startswith(word) and self._settled(number)
            self._check(number, self._numbers())
            pause(attempt)  # another was creating it, and perhaps gave up
        raise StoreError(
            f"{self._bucket.location}/{self.name(number)}: cannot be created, and is not there"
        )

    def name(self, number: int) -> str:
        """The name of an object."""
        return f"{self._folder}/{number:010}"

    def _settled(self, number: int) -> bool:
        numbers = self._numbers()
        oldest = self._check(number, numbers)
        self._bucket.remove(self.name(old) for old in numbers if old < oldest)
        return True

    def _check(self, number: int, numbers: list[int]) -> int:
        """The oldest number that is kept. Raises `StoreError` where `number` is older."""
        newest = max(numbers, default=number)
        if number < newest - KEPT:
            raise StoreError(
                f"{self._bucket.location}: {newest - number} changes were made while this one was; "
                "whether it was made cannot be told: look, and make it again if it was not"
            )
        return newest - KEPT

    def _numbers(self) -> list[int]:
        names = (name.rpartition("/")[2] for name in self._bucket.names(self._folder))
        return [int(name) for name in names if name.isdecimal()]


def pause(attempt: int) -> None:
    """Wait a moment, longer with each attempt, so that many at once get out of each other's way."""
    time.sleep(random.uniform(0, 0.01 * min(2**attempt, 50)))  # noqa: S311 - no secret
