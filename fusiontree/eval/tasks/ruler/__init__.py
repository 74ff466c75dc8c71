"""RULER-style tasks: the thirteen of NVIDIA's RULER (arXiv:2404.06654) from our own words, texts and generators."""

from fusiontree.eval.tasks.ruler.task import FAMILY, RulerTask

__all__ = ["FAMILY", "RulerTask"]
