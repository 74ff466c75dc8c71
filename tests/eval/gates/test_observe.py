"""What is recorded of the gates is what the model gives out."""

import pytest
import torch

from fusiontree.data.tokenizer import byte_tokenizer
from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.gates import ReadText, draw_gates, read_text, watch
from fusiontree.models.gate_statistics import TOKEN_CLASSES
from tests.deploy import tiny
from tests.eval.subjects import hybrid, llama

TEXT = "The state, 42 – naïve\nreads on. "
PRUNED = [{}, {"mixers": ["mamba"]}, {}, {"block": "sequential", "mixers": ["attention"]}]


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model(vocab_size=258, num_hidden_layers=4, layers=PRUNED, pad_token_id=None, bos_token_id=None,
                           eos_token_id=256)  # fmt: skip


def test_pieces_are_the_text() -> None:
    read = read_text(byte_tokenizer(), TEXT)
    assert len(read.ids) == len(read.pieces) == len(TEXT.encode()) and "".join(read.pieces) == TEXT
    assert read.pieces.count("") == 3  # the dash has three bytes, the ï two
    assert [len(row["input_ids"][0]) for row in read.rows(16, 9)] == [16, 16, 3]
    assert len(read.rows(16, 2)) == 2


def test_the_record_is_what_the_model_gives_out(model) -> None:
    read = read_text(byte_tokenizer(), TEXT)
    record = watch(model, read.rows(16, 9), read, byte_tokenizer())
    with torch.no_grad():
        gates = model(torch.tensor([read.ids]), output_gates=True).gates
        rows = [model(row["input_ids"], output_gates=True).gates for row in read.rows(16, 9)]
    shown = record["shown"]
    for n, layer in enumerate((0, 2)):
        assert torch.tensor(shown["mean"][n]).sub(gates[layer][0].mean(-1)).abs().max() < 1e-4
        assert torch.tensor(shown["std"][n]).sub(gates[layer][0].std(-1, correction=0)).abs().max() < 1e-4
        found, every = record["layers"][layer]["gate"], torch.cat([row[layer][0] for row in rows])
        assert found["mean"] == pytest.approx(every.mean().item(), abs=1e-4)
        assert found["channel_mean"] == pytest.approx(every.mean(0).tolist(), abs=1e-4)
        at_3 = torch.stack([rows[0][layer][0, 3], rows[1][layer][0, 3]]).mean()  # the third row has no place 3
        assert len(rows[2][layer][0]) == 3 and found["position_mean"][3] == pytest.approx(at_3.item(), abs=1e-4)
    assert record["tokens"] == 35 and record["rows"] == 3 and record["position_edges"] == list(range(17))
    assert [layer["mixers"] for layer in record["layers"]][1:] == [["mamba"], ["mamba", "attention"], ["attention"]]
    assert [layer["gate"] is None for layer in record["layers"]] == [False, True, False, True]


def test_kinds_of_tokens(model) -> None:
    read = read_text(byte_tokenizer(), "ab 12 .")
    record = watch(model, read.rows(32, 1), read, byte_tokenizer())
    names = ["word", "word", "space", "number", "number", "space", "punctuation"]
    assert record["shown"]["classes"] == names
    assert record["class_tokens"] == {name: names.count(name) for name in TOKEN_CLASSES}
    means, by_class = record["shown"]["mean"][0], record["layers"][0]["gate"]["classes"]
    assert by_class["number"] == pytest.approx((means[3] + means[4]) / 2, abs=1e-4)


def test_padding_and_documents_count_as_they_should(model) -> None:
    read = read_text(byte_tokenizer(), "abcdefgh")
    ids = torch.tensor([read.ids])
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])}
    record = watch(model, [packed], read, byte_tokenizer())
    assert record["position_edges"][-1] == 5 and record["tokens"] == 8
    alone = watch(model, [{"input_ids": ids[:, 3:]}], read, byte_tokenizer())
    assert record["layers"][0]["gate"]["position_mean"][4] == alone["layers"][0]["gate"]["position_mean"][4]
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])}
    kept = watch(model, [padded], read, byte_tokenizer())
    assert kept["tokens"] == 5
    assert kept["layers"][2]["gate"]["mean"] == pytest.approx(alone["layers"][2]["gate"]["mean"], abs=1e-5)


def test_long_rows_are_shown_in_stretches() -> None:
    read = read_text(byte_tokenizer(), "x" * 200)
    record = watch(hybrid(256), read.rows(200, 1), read, byte_tokenizer())
    edges = record["position_edges"]
    assert edges[:3] == [0, 4, 8] and edges[-1] == 200 and len(record["layers"][0]["gate"]["position_mean"]) == 50


def test_heat_maps_are_drawn_for_every_layer(model) -> None:
    read = read_text(byte_tokenizer(), TEXT)
    pictures = draw_gates(watch(model, read.rows(16, 9), read, byte_tokenizer()))
    assert set(pictures) == {"channels", "positions"}
    assert all(png.startswith(b"\x89PNG") and len(png) > 5000 for png in pictures.values())


def test_models_without_gates_are_refused() -> None:
    read, tokenizer = read_text(byte_tokenizer(), "ab"), byte_tokenizer()
    with pytest.raises(ConfigError, match="a llama model has none; only FusionTree models have"):
        watch(llama(), read.rows(8, 1), read, tokenizer)
    cut = tiny.tiny_model(vocab_size=258, layers=[{"mixers": ["mamba"]}, {"mixers": ["attention"]}])
    with pytest.raises(ConfigError, match="no layer of this model has two branches"):
        watch(cut, read.rows(8, 1), read, tokenizer)
    with pytest.raises(DataError, match="no text to watch"):
        watch(hybrid(), [], read, tokenizer)
    with pytest.raises(DataError, match="no text to show"):
        watch(hybrid(), read.rows(8, 1), ReadText([], []), tokenizer)
    with pytest.raises(DataError, match="gives id 300, the model has 258 embeddings"):
        watch(hybrid(), [{"input_ids": torch.tensor([[300]])}], read, tokenizer)
