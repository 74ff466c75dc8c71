"""`fusiontree data` on files of one's own."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Call


def test_download_then_inspect_files_and_prepared_folders(call: Call, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "one"}\n{"text": "three"}\n{"text": "three"}\n{"txt": 1}\n')
    copy, folder = tmp_path / "copy.jsonl", tmp_path / "tokens"
    done = call("data", "download", source, "--out", copy, "--limit", "3")
    assert done.exit_code == 0 and "3 documents" in done.stdout, done.output
    assert call("data", "prepare", copy, "--tokenizer", "byte", "--out", folder).exit_code == 0
    seen = call("data", "inspect", source, folder, "--tokenizer", "byte")
    assert seen.exit_code == 0, seen.output
    ours, prepared = (part.splitlines() for part in seen.stdout.split(f"{folder}\n"))
    assert ours[0] == str(source) and ours[1:5] == prepared[:4]
    assert f"{source}:4: " in seen.stdout and "duplicates  1 (33.3%)" in seen.stdout


def test_clean_says_what_it_removed(call: Call, tmp_path: Path) -> None:
    old = tmp_path / "cache" / "tokens" / "0123"
    old.mkdir(parents=True)
    (old / "tokens.bin").write_bytes(bytes(3_000_000))
    assert "removed 0 token folders" in call("data", "clean", "--cache-dir", tmp_path / "cache").stdout
    done = call("data", "clean", "--days", "0", "--cache-dir", tmp_path / "cache")
    assert done.exit_code == 0 and "removed 1 token folders, 3 MB" in done.stdout and not old.exists()
