"""A text corpus and a run of a few steps, made once by the command line itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fusiontree.cli.main import app

WORDS = ("the", "state", "is", "read", "and", "a", "window", "moves", "while", "its", "gate", "learns", "to", "choose")
CONFIG = """
model: {{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, sliding_window: 8, mamba_head_dim: 16,
  mamba_d_state: 8, gate_rank: 4, max_position_embeddings: 256}}
training: {{steps: 4, sequence_length: 32, micro_batch_size: 2, precision: fp32, validation_batches: 2}}
data:
  train: [{{path: {corpus}}}]
  validation_fraction: 0.2
  cache_dir: {cache}
  tokenizer: {{train_vocab_size: 300}}
gate_monitor: {{every: 2, sample_every: 1}}
logging: {{every: 1, tensorboard: false}}
system: {{run_dir: {run}, device: cpu}}
"""

Call = Callable[..., Result]


@pytest.fixture(scope="session")
def call() -> Call:
    """Run `fusiontree` with these words in this process."""
    runner = CliRunner()
    return lambda *words, **more: runner.invoke(app, [str(word) for word in words], **more)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    lines = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 60)) for i in range(1, 60)]
    path.write_text("".join(f'{{"text": "document {i}: {line}"}}\n' for i, line in enumerate(lines)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(corpus=corpus, cache=folder / "cache", run=folder / "run"), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def run(call: Call, config: Path) -> Path:
    """The run folder of a finished training."""
    result = call("train", config)
    assert result.exit_code == 0, result.output
    return config.parent / "run"
