"""Tokenizers from folders that others made: no remote code, known names and sizes only."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fusiontree.deploy.files import path_inside
from fusiontree.errors import CheckpointError
from fusiontree.models.json_files import one_line


def load_saved_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model; never runs code from the folder."""
    folder = Path(path)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise CheckpointError(f"{folder}: has no tokenizer (tokenizer.json)")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as problem:  # the tokenizers library raises bare Exception for malformed files
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {one_line(problem)}") from None


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
MAX_TOKENIZER_BYTES = 512 * 1024 * 1024


def copy_tokenizer_files(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer of `source` byte by byte under its known names; returns those copied."""
    copied = []
    for name in TOKENIZER_FILES:
        original = source / name
        if not original.is_file():
            continue
        if original.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"{original}: larger than the {MAX_TOKENIZER_BYTES:,} bytes allowed")
        path_inside(target, name, CheckpointError).write_bytes(original.read_bytes())
        copied.append(name)
    return copied
