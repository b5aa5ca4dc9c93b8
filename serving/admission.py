"""Decides who may wait for the engine, how long, and who gives way when too much waits.

The queue is full when what waits would take longer than is allowed, by the rate measured, or has
too many tokens. Until then everybody may enter. A full queue is shared, by weight, among the keys
that have something waiting: a key within its share may enter all the same, and the newest requests
of the keys furthest over theirs give way. Policy alone: no threads, and the caller tells the time.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic

from serving.batching import FairQueue, Part, Request, Work
from serving.errors import (
    DeadlineError,
    OverloadedError,
    RateLimitedError,
    ServingError,
    TooLargeError,
)

SMOOTHING = 1 / 16
"""What the newest batch counts in the rate, which so follows a change within some ten batches."""


@dataclass(frozen=True)
class Limits:
    """How large one batch is, and how much may wait."""

    batch_tokens: int
    queued_tokens: int
    queued_s: float


@dataclass(frozen=True, slots=True)
class Refused(Generic[Work]):
    """What was admitted and is answered with an error after all."""

    parts: list[Part[Work]]
    error: ServingError


@dataclass(slots=True)
class _Account(Generic[Work]):
    """What a key has waiting."""

    weight: float
    tokens: int = 0
    requests: OrderedDict[Request, list[Part[Work]]] = field(default_factory=OrderedDict)
    """Oldest first."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """What the engine is at."""

    tokens: int
    began: float
    full: bool
    """Whether its speed tells of an engine that has enough to do."""


class Admission(Generic[Work]):
    """The queue and its door. The caller sees to it that one thread at a time uses it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._queue: FairQueue[Work] = FairQueue()
        self._accounts: dict[str, _Account[Work]] = {}
        self._weights = 0.0  # of all accounts
        self._batch: _Batch | None = None
        self._batch_s = 0.0  # of the last batch
        self._rate = math.inf  # tokens a second of full batches; infinite until one was seen
        self.tokens = 0
        """Of all that wait."""
        self.capacity: float = limits.queued_tokens
        """Tokens from which on the queue is full."""

    def admit(self, parts: list[Part[Work]], now: float) -> list[Refused[Work]]:
        """Let a request in with all its parts; gives what gives way to it.

        Raises `TooLargeError`, `OverloadedError`, `RateLimitedError` or `DeadlineError`.
        """
        request = parts[0].request
        tokens = sum(sum(part.lengths) for part in parts)
        if tokens > self._limits.queued_tokens:
            raise TooLargeError(
                f"the inputs have {tokens} tokens; one request may have "
                f"{self._limits.queued_tokens}: send them in several requests"
            )
        full = self._is_full(tokens)
        if full and (refusal := self._refusal(request.key, request.weight, tokens)):
            raise refusal
        if request.deadline is not None and now + self._estimate(request, tokens, now) > (
            request.deadline
        ):
            raise DeadlineError("the deadline would pass before the answer; too much is waiting")
        refused = self._make_room(request, tokens) if full else []
        self._enter(request, parts, tokens)
        return refused

    def saturated(self, key: str, weight: float) -> OverloadedError | None:
        """What even the smallest request of this key would now be refused with."""
        return self._refusal(key, weight, 1) if self._is_full(1) else None

    def remove(self, part: Part[Work]) -> None:
        """Free the place of a part that nobody waits for any more."""
        if part.waits:
            tokens = sum(part.lengths[part.taken :])
            self._queue.remove(part)
            self._leave(part.request, tokens)

    def take(self, now: float) -> tuple[list[tuple[Part[Work], int]], list[Refused[Work]]]:
        """The next batch, as parts and the numbers of their sequences, and what came too late.

        Nothing is begun that has waited longer than is allowed, and for one full batch more: the
        one that was under way when it came; nor what would wait that long until its end, turn by
        turn with what waits now. What has begun is finished, unless its deadline passes: else its
        forwards would be for nothing.
        """
        refused: list[Refused[Work]] = []

        def is_late(part: Part[Work]) -> bool:
            error = self._lateness(part, now)
            if error is not None:
                refused.append(self._refuse(part.request, error))
            return error is not None

        taken = self._queue.take(self._limits.batch_tokens, is_late)
        tokens = 0
        for part, index in taken:
            tokens += part.lengths[index]
            part.request.begun = True
            self._leave(part.request, part.lengths[index])
        full = self.tokens > 0 or 2 * tokens >= self._limits.batch_tokens
        self._batch = _Batch(tokens, now, full)
        return taken, refused

    def answered(self, now: float) -> None:
        """The batch taken last is done; nothing to note where there was none."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        self._batch_s = now - batch.began
        if batch.full and self._batch_s > 0:
            rate = batch.tokens / self._batch_s
            known = self._rate < math.inf
            self._rate = self._rate + SMOOTHING * (rate - self._rate) if known else rate
            # Room for one batch at least, or no batch would be full again and tell its speed.
            in_time = max(self._rate * self._limits.queued_s, self._limits.batch_tokens)
            self.capacity = min(self._limits.queued_tokens, in_time)

    def clear(self) -> list[Part[Work]]:
        """Let everything go that waits."""
        waiting = [
            part
            for account in self._accounts.values()
            for parts in account.requests.values()
            for part in parts
        ]
        for part in waiting:
            part.taken = len(part.lengths)
        self._queue = FairQueue()
        self._accounts.clear()
        self._weights = 0.0
        self.tokens = 0
        return waiting

    def _enter(self, request: Request, parts: list[Part[Work]], tokens: int) -> None:
        account = self._accounts.get(request.key)
        if account is None:
            account = self._accounts[request.key] = _Account(0.0)
        self._weights += request.weight - account.weight
        account.weight = request.weight
        account.tokens += tokens
        account.requests[request] = parts
        request.tokens = tokens
        self.tokens += tokens
        for part in parts:
            self._queue.push(part)

    def _leave(self, request: Request, tokens: int) -> None:
        account = self._accounts[request.key]
        self.tokens -= tokens
        account.tokens -= tokens
        request.tokens -= tokens
        if not request.tokens:
            del account.requests[request]
        if not account.tokens:
            del self._accounts[request.key]
            # Not what rounding has left of others.
            self._weights = self._weights - account.weight if self._accounts else 0.0

    def _refuse(self, request: Request, error: ServingError) -> Refused[Work]:
        parts = self._accounts[request.key].requests[request]
        for part in parts:
            self.remove(part)
        return Refused(parts, error)

    def _is_full(self, tokens: int) -> bool:
        too_many = self.tokens + tokens > self._limits.queued_tokens
        return too_many or self.tokens >= self.capacity

    def _standing(self, key: str, weight: float) -> tuple[int, float]:
        """The tokens that a key has waiting, and the part of everything that is its share."""
        account = self._accounts.get(key)
        if account is None:
            return 0, weight / (self._weights + weight)
        return account.tokens, weight / (self._weights - account.weight + weight)

    def _refusal(self, key: str, weight: float, tokens: int) -> OverloadedError | None:
        """Why a request cannot enter the full queue; None where it is within its key's share."""
        own, share = self._standing(key, weight)
        over = own + tokens - share * self.capacity
        if over <= 0:
            return None
        if own == self.tokens:
            return self._no_room(tokens)
        return RateLimitedError(
            f"other keys wait too, and with this request the key would have {own + tokens} tokens "
            f"waiting, more than its share of {share * self.capacity:.0f}; send it again later",
            self._seconds(min(own, over) / share),
        )

    def _no_room(self, tokens: int) -> OverloadedError:
        over = max(self.tokens - self.capacity, self.tokens + tokens - self._limits.queued_tokens)
        return OverloadedError(
            f"{self.tokens} tokens are waiting, and there is no room for {tokens} more; send the "
            "request again later",
            self._seconds(over),
        )

    def _make_room(self, request: Request, tokens: int) -> list[Refused[Work]]:
        """Have newest requests give way, of the key furthest over its share first; none that has
        begun, whose forwards would have been for nothing.

        No key loses what lies within its share. That may leave less room than wanted, which only
        the number of tokens forbids: the request itself is within its key's share.
        """
        _, share = self._standing(request.key, request.weight)
        of_one = share * self.capacity / request.weight
        missing = self.tokens + tokens - self.capacity
        over = [
            (-account.tokens / account.weight, key, account.tokens, _newest(account.requests))
            for key, account in self._accounts.items()
            if account.tokens > of_one * account.weight
        ]
        heapify(over)
        giving: list[Request] = []
        while over and missing > 0:
            _, key, waiting, newest = heappop(over)
            last, weight = next(newest, None), self._accounts[key].weight
            if last is None:
                continue
            waiting -= last.tokens
            if waiting >= of_one * weight:
                giving.append(last)
                missing -= last.tokens
                heappush(over, (-waiting / weight, key, waiting, newest))
        freed = sum(one.tokens for one in giving)
        if self.tokens - freed + tokens > self._limits.queued_tokens:
            raise self._no_room(tokens)
        return [self._refuse(one, self._pushed_out(one)) for one in giving]

    def _pushed_out(self, request: Request) -> RateLimitedError:
        own, share = self._standing(request.key, request.weight)
        return RateLimitedError(
            f"other keys wait too, and the key has {own} tokens waiting, more than its share of "
            f"{share * self.capacity:.0f}; send the request again later",
            self._seconds(own / share - self.capacity),
        )

    def _estimate(self, request: Request, tokens: int, now: float) -> float:
        """Seconds until a request would be answered: after the batch under way, what its key has
        waiting, at its share of the rate; at most, after all that waits."""
        own, share = self._standing(request.key, request.weight)
        ahead = min(self.tokens + tokens, (own + tokens) / share)
        running = 0.0
        if self._batch is not None:
            running = max(0.0, self._batch.tokens / self._rate - (now - self._batch.began))
        return running + ahead / self._rate

    def _lateness(self, part: Part[Work], now: float) -> ServingError | None:
        request = part.request
        if request.deadline is not None and now > request.deadline:
            return DeadlineError("the deadline passed before the request's turn came")
        waited = now - request.submitted - part.forward_s
        one_batch_s = max(self._batch_s, self._limits.batch_tokens / self._rate)
        if request.begun:
            return None
        more = self._between_turns(request)
        if waited + more <= self._limits.queued_s + one_batch_s:
            return None
        still = f" and would wait for {more:.1f} s more between its turns" if more else ""
        return OverloadedError(
            f"the request waited for {waited:.1f} s{still}, and {self._limits.queued_s:.1f} s are "
            "allowed: too much is waiting beside it; send it again later",
            self._seconds(self.tokens - self.capacity),
        )

    def _between_turns(self, request: Request) -> float:
        """Seconds for which a request whose turn has come waits for others until its end."""
        own, share = self._standing(request.key, request.weight)
        turns = request.tokens * self._queue.lines(request.key)
        return (min(self.tokens, own / share, turns / share) - request.tokens) / self._rate

    def _seconds(self, tokens: float) -> int:
        """For `Retry-After`: until that many tokens have been taken, by the rate and in batches."""
        return max(1, math.ceil((tokens + self._limits.batch_tokens) / self._rate))


def _newest(requests: OrderedDict[Request, list[Part[Work]]]) -> Iterator[Request]:
    """Those that have not begun, the newest first."""
    return (request for request in reversed(requests) if not request.begun)
