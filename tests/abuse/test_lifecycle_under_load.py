"""Everything is changed all the time while clients ask: no request fails, no answer is wrong.

Long form: 10 minutes with three replicas instead of 15 seconds with two.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tests.abuse.place import Place
from tests.abuse.traffic import Timeline, traffic
from tests.abuse.variants import Variant, make_variants
from tests.soak import report, soak

FOR_S = 600.0 if soak() else 15.0
CLIENTS = 6
VARIANTS = 6


@dataclass
class Changer:
    """Changes one task at random, and knows what must be served after each change."""

    place: Place
    task: str
    variants: list[Variant]
    seed: int
    timeline: Timeline = field(init=False)
    made_of: dict[tuple[str, int], int] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    took_s: list[float] = field(default_factory=list)
    versions: dict[int, int] = field(default_factory=dict)
    """The variant of each version that there is."""
    next_version: int = 1
    active: int | None = None
    canary: int | None = None
    shadow: int | None = None
    history: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.timeline = Timeline(frozenset([None]))

    @property
    def allowed(self) -> frozenset[int | None]:
        """Who may answer now."""
        return frozenset([self.active] if self.canary is None else [self.active, self.canary])

    def change(self) -> None:
        """One change that the present state allows."""
        others = [number for number in self.versions if number != self.active]
        old = [number for number in others if number not in (self.canary, self.shadow)]
        possible: list[Callable[[], None]] = [self.register, self.register_again]
        if others:
            number = self.dice.choice(others)
            possible += [lambda: self.activate(number), lambda: self.set_canary(number)]
            possible.append(lambda: self.set_shadow(number))
        if self.shadow is not None:
            possible.append(self.clear_shadow)
        if self.canary is not None:
            possible.append(self.clear_canary)
        if self.history:
            possible.append(self.roll_back)
        if old:
            unused = self.dice.choice(old)
            possible.append(lambda: self.delete(unused))
        self.dice.choice(possible)()

    def register(self) -> None:
        """A variant that has no version now."""
        free = [one for one in self.variants if one.number not in self.versions.values()]
        if not free:
            self.delete_task()
            return
        variant, number = self.dice.choice(free), self.next_version
        self.next_version += 1
        self.made_of[self.task, number] = variant.number

        def new() -> None:
            self.versions[number] = variant.number
            self._activated(number)

        found = self._tell("register", new, "POST", "versions", 201, content=variant.data)
        assert (found["version"], found["created"]) == (number, True)

    def register_again(self) -> None:
        """The bytes of a version that there is: it becomes the active one."""
        if not self.versions:
            self.register()
            return
        number = self.dice.choice(list(self.versions))
        data = self.variants[self.versions[number]].data
        found = self._tell(
            "register again", lambda: self._activated(number), "POST", "versions", content=data
        )
        assert (found["version"], found["created"]) == (number, False)

    def activate(self, number: int) -> None:
        self._tell(
            "activate",
            lambda: self._activated(number),
            "POST",
            "activate",
            json={"version": number},
        )

    def roll_back(self) -> None:
        def new() -> None:
            self.active = self.history.pop()
            self._settle()

        self._tell("rollback", new, "POST", "rollback")

    def set_canary(self, number: int) -> None:
        def new() -> None:
            self.canary = number

        body = {"version": number, "percent": 40}
        self._tell("canary", new, "PUT", "canary", json=body)

    def clear_canary(self) -> None:
        def new() -> None:
            self.canary = None

        self._tell("canary ended", new, "DELETE", "canary")

    def set_shadow(self, number: int) -> None:
        """It is asked as well, and nobody gets its answers."""

        def new() -> None:
            self.shadow = number

        self._tell("shadow", new, "PUT", "shadow", json={"version": number})

    def clear_shadow(self) -> None:
        def new() -> None:
            self.shadow = None

        self._tell("shadow ended", new, "DELETE", "shadow")

    def delete(self, number: int) -> None:
        def new() -> None:
            del self.versions[number]
            self.history = [past for past in self.history if past != number]
            self._settle()

        self._tell("version deleted", new, "DELETE", f"versions/{number}")

    def delete_task(self) -> None:
        def new() -> None:
            self.versions, self.history = {}, []
            self.active = self.canary = self.shadow = None

        self._tell("task deleted", new, "DELETE", "")

    def _activated(self, number: int) -> None:
        if self.active not in (None, number):
            assert self.active is not None
            self.history = [past for past in self.history if past != number] + [self.active]
        self.active = number
        self._settle()

    def _settle(self) -> None:
        if self.canary == self.active or self.canary not in self.versions:
            self.canary = None
        if self.shadow == self.active or self.shadow not in self.versions:
            self.shadow = None

    def _tell(
        self,
        kind: str,
        new: Callable[[], None],
        method: str,
        path: str,
        expected: int = 200,
        **request: Any,
    ) -> dict[str, Any]:
        """Make a change, half of them without waiting, and tell the timeline."""
        new()
        self.timeline.changing(self.allowed)
        began = time.monotonic()
        url = f"/v1/tasks/{self.task}/{path}".rstrip("/")
        if self.dice.random() < 0.5:
            found = self.place.change(method, url, expected, **request)
        else:
            begun = self.place.change(method, f"{url}?wait=false", 202, **request)
            found = self._follow(begun["operation"])
        self.took_s.append(time.monotonic() - began)
        assert found["state"] == "done", found["error"]
        assert found["ready"] == found["replicas"] == len(self.place.server.replicas())
        self.timeline.changed(self.allowed)
        self.done[kind] += 1
        return found

    def _follow(self, operation: str) -> dict[str, Any]:
        while True:
            found = self.place.change("GET", f"/v1/operations/{operation}")
            if found["state"] != "running":
                return found
            time.sleep(0.01)


def test_no_request_fails_and_no_answer_is_wrong_while_everything_changes(place: Place) -> None:
    steady = make_variants(place.backbone, "steady", 1, seed=1)
    place.register("steady", steady[0].data)
    changers = [
        Changer(place, task, make_variants(place.backbone, task, VARIANTS, seed), seed)
        for seed, task in enumerate(("moving", "going"), start=2)
    ]
    variants = {"steady": steady} | {one.task: one.variants for one in changers}
    timelines = {"steady": Timeline(frozenset([1]))} | {one.task: one.timeline for one in changers}
    failures: list[BaseException] = []

    def keep_changing(changer: Changer) -> None:
        until = time.monotonic() + FOR_S
        try:
            while time.monotonic() < until and not failures:
                changer.change()
        except BaseException as error:  # noqa: BLE001 - the test raises it
            failures.append(error)

    with traffic(place.server.port, CLIENTS, variants) as seen:
        changing = [threading.Thread(target=keep_changing, args=[one]) for one in changers]
        for thread in changing:
            thread.start()
        for thread in changing:
            thread.join()
    if failures:
        raise failures[0]

    made_of = {("steady", 1): 0} | changers[0].made_of | changers[1].made_of
    wrong = seen.wrong(timelines, made_of)
    done = changers[0].done + changers[1].done
    took = sorted(changers[0].took_s + changers[1].took_s)
    report(
        f"register, replace, roll back, canary, shadow and delete under load, {FOR_S:.0f} s",
        f"{sum(done.values()):,} changes, {len(seen.answers):,} requests: {len(wrong)} failed or "
        f"wrong; a change took {median(took):.2f} s (median), {took[-1]:.2f} s (most)",
    )
    assert wrong[:5] == []
    answered = Counter((one.task, one.version) for one in seen.answers if one.status == 200)
    assert sum(done.values()) >= 10
    assert len(answered) >= 5, "versions that have answered"
    assert len(done) >= (10 if soak() else 4)
