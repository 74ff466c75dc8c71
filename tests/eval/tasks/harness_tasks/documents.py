"""What the task files beside this one ask; the harness calls these functions."""

import datasets

WORDS = ("state", "window", "gate", "branch", "layer")


def questions(**_):
    rows = [
        {
            "question": f"{word} number {i}" + (" and so on" * (i % 4)),
            "choices": [f"the {word}", "another thing", "no"],
            "answer": i % 3,
        }
        for i, word in enumerate(WORDS * 2)
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def pages(**_):
    rows = [{"page": f"{word}. " + "the state is read and a window moves; " * i} for i, word in enumerate(WORDS)]
    return {"test": datasets.Dataset.from_list(rows)}


def nothing(**_):
    return {"test": datasets.Dataset.from_list([])}
