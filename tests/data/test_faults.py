"""Faults that need a process of their own: a huge line under a memory limit, a full disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HUGE_LINE = """
import resource, sys
from fusiontree.data import DataConfig, SourceConfig, build_loader, byte_tokenizer
path, megabytes = sys.argv[1], int(sys.argv[2])
with open(path, "wb") as handle:
    for _ in range(50):
        handle.write(b'{"text": "a good document that stays"}\\n')
    handle.write(b'{"text": "')
    for _ in range(megabytes):
        handle.write(b"x" * 1_000_000)
    handle.write(b'"}\\n{"text": "the last one"}\\n')
tokenizer = byte_tokenizer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = SourceConfig(path=path, max_document_bytes=1_000_000)
loader = build_loader(DataConfig(train=[source], validation=[source]), tokenizer, "train", 32, 2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, *loader.bad_records.examples, sep="|")
"""

FULL_DISK = """
import resource, sys
from pathlib import Path
from fusiontree.data import SourceConfig, byte_tokenizer, prepare_static
from fusiontree.errors import DataError
text, out = sys.argv[1:]
Path(text).write_text("word " * 200_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    prepare_static([SourceConfig(path=text)], byte_tokenizer(), out)
except DataError as error:
    print(error)
"""


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.fault(row=17)
def test_a_200_mb_line_is_skipped_by_name_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    growth, *examples = run(HUGE_LINE, str(path), "200").split("|")
    assert int(growth) < 40_000, "kilobytes"
    assert examples == [f"{path}:51: 200000012 bytes, longer than max_document_bytes 1000000"]


@pytest.mark.fault(row=4)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "static"
    message = run(FULL_DISK, str(tmp_path / "a.txt"), str(out))
    assert message == f"{out}: cannot be written: File too large"
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["a.txt"]
