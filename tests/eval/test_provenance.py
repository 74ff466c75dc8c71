"""Where a number comes from: the machine, and the commit with a mark when what was measured differs from it."""

import subprocess
from pathlib import Path

import pytest
import torch

from fusiontree.eval import provenance


def test_machine_versions_and_date_are_json() -> None:
    found = provenance.provenance(torch.device("cpu"))
    assert found["versions"].keys() == {"python", *provenance.PACKAGES}
    assert found["machine"]["device"] == "cpu" and found["machine"]["cores"] >= 1
    assert found["machine"]["threads"] == torch.get_num_threads() and found["machine"]["memory_gb"] > 0.1
    assert found["date"].endswith("+00:00")


def test_the_commit_is_marked_when_the_package_or_what_is_named_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() is None  # installed, no source tree
    for folder in ("fusiontree", "benchmarks", "docs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("1\n")
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    for words in (("init", "-q"), ("add", "-A"), (*identity, "commit", "-q", "-m", "all")):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    head = provenance.commit()
    assert head and len(head) == 12
    (tmp_path / "docs" / "a.py").write_text("2\n")
    (tmp_path / "benchmarks" / "a.py").write_text("2\n")
    assert provenance.commit() == head and provenance.commit("benchmarks/*.py") == f"{head} + changes"
    (tmp_path / "fusiontree" / "a.py").write_text("2\n")
    assert provenance.commit() == f"{head} + changes"
