"""A small task that can be learned: which of two words does a text hold?"""

import json
import random
from pathlib import Path

from localization.network import Progress

FILLERS = "the a cat dog film bank card is was very new old red blue big small money news".split()


class Silent:
    """A reporter that remembers the steps, and stops where it is told to."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.steps: list[str] = []
        self._stop_at = stop_at

    def step(self, name: str) -> Progress:
        if name == self._stop_at:
            raise KeyboardInterrupt
        self.steps.append(name)
        return lambda done, total, text: None

    def note(self, text: str) -> None:
        assert text


def write_rows(file: Path, count: int, seed: int, *, pairs: bool = False) -> None:
    """Rows whose label is `good` or `bad` after the word that the text holds."""
    generator = random.Random(seed)
    with file.open("w") as lines:
        for _ in range(count):
            label = generator.choice(["good", "bad"])
            words = generator.choices(FILLERS, k=generator.randint(1, 8))
            words.insert(generator.randint(0, len(words)), label)
            text = " ".join(words)
            row = {"text1": "the film", "text2": text} if pairs else {"text": text}
            lines.write(json.dumps(row | {"label": label}) + "\n")
