"""The text of configs/results: Wikipedia and the standard library, each with a part that no model is trained on.

python scripts/results_data.py FOLDER    FOLDER holds train.jsonl, valid.jsonl and test.jsonl of Wikipedia
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

from fusiontree.data import stdlib_corpus

OUT = Path("data/results")
# Whole packages, so that their files import each other and the completion benchmark finds cross-file uses in them.
HELD_OUT = ("asyncio", "email", "json", "sqlite3", "wsgiref", "xml", "zoneinfo")


def main() -> None:
    """Make data/results/: three files of Wikipedia, and the standard library cut in two."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for name in ("train", "valid", "test"):
        place(Path(sys.argv[1], f"{name}.jsonl"), OUT / "wikipedia" / f"{name}.jsonl")
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in stdlib_corpus():
        below = path.relative_to(root)
        part = "heldout" if below.parts[0] in HELD_OUT else "train"
        place(path, OUT / "stdlib" / part / below)


def place(source: Path, target: Path) -> None:
    """Copy one file, making its folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


if __name__ == "__main__":
    main()
