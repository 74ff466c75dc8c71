"""Overlap of words: the SQuAD F1 and its Chinese form, as LongBench and L-Eval count it."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from fusiontree.eval.metrics.chinese import segment

ARTICLES = re.compile(r"\b(a|an|the)\b")
ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
# The signs LongBench drops besides the ASCII ones: full-width forms, CJK brackets and dots, dashes and quotes.
# It lacks 《, an oversight that every published number has.
CHINESE_SIGNS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
    "–—‘’‛“”„‟…‧﹏."
)
ALL_PUNCTUATION = str.maketrans("", "", string.punctuation + CHINESE_SIGNS)


def without_articles(text: str) -> str:
    """The text without punctuation and articles, blanks made single; upper and lower case stay."""
    return " ".join(ARTICLES.sub(" ", text.translate(ASCII_PUNCTUATION)).split())


def normalised(text: str) -> str:
    """The SQuAD form of an English answer: lower case, no punctuation, no articles, single blanks."""
    return without_articles(text.lower())


def overlap_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words as multisets; 0 when nothing is common."""
    same = sum((Counter(answer) & Counter(reference)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(answer), same / len(reference)
    return (2 * precision * recall) / (precision + recall)


def qa_f1(answer: str, reference: str) -> float:
    """F1 of the words of two English answers."""
    return overlap_f1(normalised(answer).split(), normalised(reference).split())


def qa_f1_zh(answer: str, reference: str) -> float:
    """F1 of the words that jieba finds in two Chinese answers. ConfigError without jieba."""
    return overlap_f1(_chinese_words(answer), _chinese_words(reference))


def _chinese_words(text: str) -> list[str]:
    words = ["".join(word.lower().translate(ALL_PUNCTUATION).split()) for word in segment(text)]
    return [word for word in words if word]
