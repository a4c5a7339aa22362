"""Real English in documents, for the tests of pre-training's data: Python's documentation, cut at random places."""

import random
from pathlib import Path

from bertfast import texts


def documents(sentences: int = 1500) -> list[list[str]]:
    """The first sentences of Python's documentation, in documents of 1 to 40."""
    draw, whole = random.Random(0), texts.corpus()[:sentences]
    found, begin = [], 0
    while begin < len(whole):
        end = begin + draw.randint(1, 40)
        found.append(list(whole[begin:end]))
        begin = end
    return found


def write(path: Path, found: list[list[str]]) -> Path:
    path.write_text("\n\n".join("\n".join(document) for document in found) + "\n", encoding="utf-8")
    return path
