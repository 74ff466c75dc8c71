"""The runtime on a real (tiny) checkpoint: generate, batches, stream, chat, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.deploy.chat import chat_text
from fusiontree.deploy.runtime import InferenceRuntime
from fusiontree.errors import CheckpointError, ConfigError
from tests.deploy.tiny import byte_tokenizer, save_tiny, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("runtime") / "model")


@pytest.fixture(scope="module")
def runtime(folder: Path) -> InferenceRuntime:
    return InferenceRuntime(folder, device="cpu")


def force_tokens(runtime: InferenceRuntime, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Make the model say `text` (then the end), whatever it is asked."""
    wanted = [*runtime.tokenizer(text)["input_ids"], runtime.tokenizer.eos_token_id]
    said = iter(wanted)
    monkeypatch.setattr("fusiontree.deploy.scheduler_engine.next_tokens", lambda *args: [next(said)])


def test_greedy_equals_generate_of_transformers(runtime: InferenceRuntime) -> None:
    ids = runtime.tokenizer("hello", return_tensors="pt")["input_ids"]
    wanted = runtime.model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    text = runtime.tokenizer.decode(wanted, skip_special_tokens=True)
    assert runtime.generate("hello", max_new_tokens=20) == text.rstrip("\ufffd")


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 50, "seed": 3}, {"repetition_penalty": 1.3}])
def test_a_batch_gives_each_row_what_it_gives_alone(runtime: InferenceRuntime, options: dict[str, Any]) -> None:
    prompts = ["a", "a much longer prompt than the window", "mid size"]
    together = runtime.generate(prompts, max_new_tokens=12, **options)
    seed = options.get("seed", 0)
    assert together == [
        runtime.generate(prompt, max_new_tokens=12, **{**options, "seed": seed + row})
        for row, prompt in enumerate(prompts)
    ]


def test_streamed_pieces_join_to_the_generated_text(runtime: InferenceRuntime) -> None:
    options: dict[str, Any] = {"max_new_tokens": 60, "temperature": 1.5, "seed": 1}
    pieces = list(runtime.stream("é🙂", **options))
    assert len(pieces) > 5
    for piece in pieces:
        piece.encode("utf-8")
    assert "".join(pieces) == runtime.generate("é🙂", **options)
    assert runtime.generate("é🙂", **{**options, "seed": 2}) != "".join(pieces)


def test_multi_byte_characters_are_never_split(runtime: InferenceRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    force_tokens(runtime, monkeypatch, "Grüße, 世界 🙂!")
    pieces = list(runtime.stream("x", max_new_tokens=100))
    assert "".join(pieces) == "Grüße, 世界 🙂!"
    assert all("\ufffd" not in piece for piece in pieces)
    assert "世" in pieces and "🙂" in pieces


def test_generation_ends_at_the_end_token_and_before_a_stop(
    runtime: InferenceRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_tokens(runtime, monkeypatch, "one. two")
    assert runtime.generate("x", max_new_tokens=100) == "one. two"
    force_tokens(runtime, monkeypatch, "one. two")
    assert runtime.generate("x", max_new_tokens=100, stop=".") == "one"


def test_chat_without_template_is_a_plain_dialogue(runtime: InferenceRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi {{ 7*7 }}"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    assert (
        chat_text(runtime.tokenizer, messages)
        == "Be brief.\n\nUser: Hi {{ 7*7 }}\nAssistant: Hello.\nUser: Bye\nAssistant:"
    )
    force_tokens(runtime, monkeypatch, " See you.\nUser: what I say next")
    assert runtime.chat(messages, max_new_tokens=60) == " See you."


def test_chat_uses_the_tokenizers_template_in_a_sandbox(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(copy)
    runtime = InferenceRuntime(copy, device="cpu")
    assert chat_text(runtime.tokenizer, [{"role": "user", "content": "hi"}]) == "<user>hi"
    canary = tmp_path / "canary"
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
    runtime.tokenizer.chat_template = escape
    with pytest.raises(CheckpointError, match="chat template"):
        runtime.chat([{"role": "user", "content": "hi"}])
    assert not canary.exists()


@pytest.mark.parametrize(
    "messages",
    [[], [{}], [{"role": "root", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": 3}], ["hi"]],
)
def test_malformed_messages_are_refused(runtime: InferenceRuntime, messages: Any) -> None:
    with pytest.raises(ConfigError, match="messages"):
        runtime.chat(messages)


@pytest.mark.parametrize("prompt", ["", "\ud83d", [], ["fine", ""], 3])
def test_prompts_that_are_no_text_are_refused(runtime: InferenceRuntime, prompt: Any) -> None:
    with pytest.raises(ConfigError, match="prompt"):
        runtime.generate([prompt] if isinstance(prompt, int) else prompt)


def test_what_does_not_fit_the_model_is_refused_before_the_first_token(runtime: InferenceRuntime) -> None:
    assert runtime.generate("x" * 255, max_new_tokens=1) is not None
    for call in (runtime.generate, runtime.stream):
        with pytest.raises(ConfigError, match=r"250 prompt tokens and max_new_tokens 7 .* 256 positions"):
            call("x" * 250, max_new_tokens=7)


def test_the_runtime_accepts_dtype_and_gives_finite_text_in_bf16(folder: Path) -> None:
    runtime = InferenceRuntime(folder, device="cpu", dtype=torch.bfloat16)
    assert runtime.model.dtype == torch.bfloat16
    assert isinstance(runtime.generate("hello", max_new_tokens=5), str)


def test_a_folder_without_fitting_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        InferenceRuntime(bare)
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        InferenceRuntime(broken)
    small = save_tiny(tmp_path / "small", tiny_model(vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    with pytest.raises(CheckpointError, match="the model only 100"):
        InferenceRuntime(small)


def test_a_tokenizer_that_brings_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    canary = tmp_path / "canary"
    (copy / "evil.py").write_text(f"open({str(canary)!r}, 'w').write('ran')\nclass Evil: pass\n")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        InferenceRuntime(copy)
    except CheckpointError as refusal:
        assert "\n" not in str(refusal)
    assert not canary.exists()
