"""Text in, batches out: sources, tokenizers, packing and an exactly resumable loader. Imports no other room."""

from fusiontree.data.batch import Batch
from fusiontree.data.build import build_loader
from fusiontree.data.config import DataConfig, SourceConfig, StrictModel, TokenizerConfig
from fusiontree.data.curriculum import Preset, Stage, plan_stages, stage_at
from fusiontree.data.download import CORPORA, corpus_source, download
from fusiontree.data.inspection import Inspection, inspect_source
from fusiontree.data.loader import Loader
from fusiontree.data.prepare import clean_cache, open_source, prepare_static
from fusiontree.data.records import BadRecords
from fusiontree.data.sources import read_texts, stdlib_corpus
from fusiontree.data.store import TokenStore
from fusiontree.data.tokenizer import (
    byte_tokenizer,
    check_vocabulary,
    load_tokenizer,
    resolve_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)

__all__ = [
    "CORPORA",
    "BadRecords",
    "Batch",
    "DataConfig",
    "Inspection",
    "Loader",
    "Preset",
    "SourceConfig",
    "Stage",
    "StrictModel",
    "TokenStore",
    "TokenizerConfig",
    "build_loader",
    "byte_tokenizer",
    "check_vocabulary",
    "clean_cache",
    "corpus_source",
    "download",
    "inspect_source",
    "load_tokenizer",
    "open_source",
    "plan_stages",
    "prepare_static",
    "read_texts",
    "resolve_tokenizer",
    "stage_at",
    "stdlib_corpus",
    "tokenizer_hash",
    "train_tokenizer",
]
