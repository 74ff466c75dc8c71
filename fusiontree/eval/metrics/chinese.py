"""Chinese text cut into words by jieba, the one file that knows it."""

from __future__ import annotations

import logging
import tempfile
import warnings
from functools import cache
from typing import Any

from fusiontree.errors import ConfigError


def segment(text: str) -> list[str]:
    """The words of a text, blanks and signs among them; joined again they are the text. ConfigError without jieba."""
    return list(_tokenizer().cut(text, cut_all=False))


@cache
def _tokenizer() -> Any:
    """jieba with its own dictionary, built here (1–2 s).

    jieba would keep the built dictionary in the system's temporary folder and load whatever lies there under its
    name the next time: a file that anyone on the machine may have written. A fresh folder holds nobody else's.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its use of pkg_resources, its regular expressions
            import jieba
    except ImportError:
        raise ConfigError("Chinese tasks need the package jieba: pip install 'fusiontree[eval]'") from None
    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.tmp_dir = folder
        tokenizer.initialize()
    return tokenizer
