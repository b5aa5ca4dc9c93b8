"""What a load test asks: texts, made up where none are given, as requests to tasks in turn.

Knows the predict route; nothing of how requests are sent.
"""

import json
import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from urllib.parse import quote

from model_store.manifest import TextInput
from serving.load import Question

# Words a sentence: deciles of the lengths of SST-2's test sentences.
LENGTHS = (2, 9, 11, 14, 16, 19, 21, 24, 27, 32, 47)
WORDS = """
the a of and in to is it that this film story with for as but not its you one by about too more
than an on all has like good so funny little time never characters movie even still
""".split()


def made_up_sentences() -> list[str]:
    """Sentences of common words with the lengths of SST-2's; always the same."""
    generator = random.Random(0)  # noqa: S311 - no secret
    return [
        " ".join(generator.choices(WORDS, k=round(generator.uniform(*pair))))
        for _ in range(80)
        for pair in pairwise(LENGTHS)
    ]


def groups(
    texts: Sequence[TextInput], tasks: Sequence[str], inputs: int
) -> list[tuple[str, list[TextInput]]]:
    """Tasks in turn, each with the next `inputs` texts; every text and every task is in it."""
    count = max(-(-len(texts) // inputs), len(tasks))
    return [
        (
            tasks[number % len(tasks)],
            [texts[(number * inputs + at) % len(texts)] for at in range(inputs)],
        )
        for number in range(count)
    ]


def as_input(text: TextInput, takes_pairs: bool) -> TextInput:
    """The text as a task takes it: a text in two halves for pairs, a pair as one text."""
    if isinstance(text, str) != takes_pairs:
        return text
    if not isinstance(text, str):
        return " ".join(text)
    words = text.split()
    half = len(words) // 2
    return " ".join(words[:half]), " ".join(words[half:])


def questions(
    texts: Sequence[TextInput], takes_pairs: Mapping[str, bool], inputs: int
) -> list[Question]:
    """Predict requests of `inputs` inputs each; `takes_pairs` of every task, in their turn."""
    return [
        Question(
            f"/v1/tasks/{quote(task, safe='')}/predict",
            json.dumps({"inputs": [as_input(text, takes_pairs[task]) for text in chosen]}),
        )
        for task, chosen in groups(texts, list(takes_pairs), inputs)
    ]
