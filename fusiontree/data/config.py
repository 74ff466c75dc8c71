"""Settings of the data room: where text comes from, how it is mixed and cut into rows."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

WITHOUT_EFFECT = {
    "lazy": ("subset", "split"),
    "static": (
        "subset",
        "split",
        "text_field",
        "separator",
        "min_length",
        "max_samples_per_file",
        "max_document_bytes",
        "invalid_text",
    ),
    "streaming": ("separator", "max_samples_per_file"),
}
TaskName = Literal["needle", "recall", "copy", "reverse", "sort", "add"]


class StrictModel(BaseModel):
    """Unknown keys and wrong types are errors; values never change after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class SourceConfig(StrictModel):
    """One source of documents: files, the standard library, or a folder of tokens made by `prepare_static`."""

    path: str = Field(min_length=1)
    """A file, a glob (`**` allowed), `stdlib` = the running Python's own sources, (static) a prepared folder, or
    (streaming) a corpus on the Hugging Face hub."""
    weight: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Share of the rows relative to the other training sources; none on all sources: every document once per epoch."""
    mode: Literal["lazy", "static", "streaming"] = "lazy"
    """lazy: read and tokenised on first use, then kept in the cache folder; static: tokens made by `prepare_static`;
    streaming: read and tokenised again at every pass, through Hugging Face `datasets`."""
    subset: str | None = None
    """Streaming from the hub only: the configuration of the corpus, such as 20231101.en."""
    split: str = "train"
    """Streaming from the hub only."""
    text_field: str = Field("text", min_length=1)
    """JSONL: the key that holds the document; Parquet: the column."""
    separator: str | None = Field(None, min_length=1)
    """Text files only: string between two documents (a CRLF counts as a newline); none: one document per file."""
    min_length: int = Field(1, ge=1)
    """Characters, blanks at both ends not counted; shorter documents are left out and counted."""
    max_samples_per_file: int | None = Field(None, ge=1)
    """Only the first so many usable documents of each file."""
    max_document_bytes: int = Field(10_000_000, ge=1)
    """Bytes in the file of one document (a whole JSONL line); longer ones are bad records and never held in memory."""
    invalid_text: Literal["skip", "replace"] = "skip"
    """Bytes that are not UTF-8, halves of surrogate pairs: the document is a bad record, or mended with U+FFFD."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """More bad records than this is an error; a handful is tolerated in small sources unless this is 0."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> SourceConfig:
        for name in WITHOUT_EFFECT[self.mode]:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect on a {self.mode} source")
        return self


class SyntheticConfig(StrictModel):
    """Made-up documents between the real ones, which train looking back over long distances. Training only."""

    probability: float = Field(gt=0, lt=1)
    """Share of synthetic rows among all rows; they come in addition, so every real document still comes as it would."""
    tasks: list[TaskName] = Field(list(get_args(TaskName)), min_length=1)
    """What is drawn from, all alike (named twice: twice as often); an example of each is in synthetic.py."""


class TokenizerConfig(StrictModel):
    """Which tokenizer: an existing one by `path`, or one trained on the run's own text."""

    path: str | None = None
    """A folder, a name on the Hugging Face hub (found in the local cache), or `byte` = one id per byte."""
    train_vocab_size: int | None = Field(None, ge=258)
    """Train a byte-level BPE of this many ids: 256 bytes, end of document and padding included."""
    download: bool = False
    """Whether a hub name that is not in the local cache may be downloaded."""

    @model_validator(mode="after")
    def _one_origin(self) -> TokenizerConfig:
        if self.path is not None and self.train_vocab_size is not None:
            raise ValueError("path and train_vocab_size exclude each other: load a tokenizer or train one")
        return self


class DataConfig(StrictModel):
    """Training and validation text, and how it is cut into rows."""

    train: list[SourceConfig] = []
    """Sources to learn from."""
    validation: list[SourceConfig] = []
    """Sources to measure on; none: a part of the training sources is held out."""
    validation_fraction: float = Field(0.01, ge=0, lt=1)
    """Part of each training source held out when there are no validation sources: whole documents, chosen by hash."""
    packing: bool = True
    """True: full rows of several documents; false: one document per row, rows of similar length batched, padded."""
    synthetic: SyntheticConfig | None = None
    """Needles and small structured tasks mixed into training; none: real text only."""
    seed: int | None = Field(None, ge=0)
    """Order of documents and rows; none: the seed of the run."""
    num_workers: int = Field(0, ge=0)
    """Threads that prepare batches ahead; 0 prepares each when it is asked for. Never changes the batches."""
    allow_changed: bool = Field(False, exclude=True)
    """Go on at the same position although the text is another than when the run was saved; is not itself saved."""
    cache_dir: str | None = None
    """Folder of tokenised text; none: $FUSIONTREE_CACHE, else fusiontree/ in the user's cache folder."""

    @model_validator(mode="after")
    def _weights_on_all_or_none(self) -> DataConfig:
        given = [source.weight is not None for source in self.train]
        if any(given) and not all(given):
            raise ValueError("train: give every source a weight, or none of them")
        if any(source.weight is not None for source in self.validation):
            raise ValueError("validation: a weight has no effect there, every document is read once")
        return self

    @model_validator(mode="after")
    def _streams_fit(self) -> DataConfig:
        streams = [source for source in self.train if source.mode == "streaming"]
        if any(source.mode == "streaming" for source in self.validation):
            raise ValueError("validation: streaming has no end; use mode: lazy or static there")
        if streams and not self.packing:
            raise ValueError("packing: a streaming source needs it")
        if streams and len(self.train) > 1 and streams[0].weight is None:
            raise ValueError("train: a streaming source has no known size; give every source a weight")
        if self.synthetic and "needle" in self.synthetic.tasks and len(streams) == len(self.train) > 0:
            raise ValueError("synthetic: a needle lies in the text of a lazy or static source; there is none")
        return self
