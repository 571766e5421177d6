"""Tokenized rows that share their beginnings on several levels, as the tests of sharing take them."""

import random

from qlora_lite.data.template import Encoded
from qlora_lite.data.trees import LEAST_SHARED
from tests.tiny_model import Rows

VOCABULARY = 300


def random_tree(rng: random.Random, *, depth: int, fan: int) -> Rows:
    """Examples below a random tree of runs; some end where others go on, some have several labelled turns."""
    examples: list[Encoded] = []

    def tokens(least: int, most: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(least, most))]

    def visit(prefix: list[int], levels: int) -> None:
        for _ in range(rng.randint(1, fan)):
            if levels and rng.random() < 0.7:
                visit(prefix + tokens(LEAST_SHARED, 40), levels - 1)
                continue
            prompt = prefix + tokens(0 if prefix else 1, 30)
            answer = tokens(1, 8)
            spans = [(len(prompt), len(prompt) + len(answer))]
            ids = prompt + answer
            if rng.random() < 0.3:  # a second turn
                ids = ids + tokens(1, 6)
                spans.append((len(ids), len(ids) + 3))
                ids = ids + tokens(3, 3)
            examples.append(Encoded(ids, tuple(spans)))

    visit(tokens(LEAST_SHARED, 40), depth)
    rng.shuffle(examples)
    return Rows(examples)
