"""Grids: means by two facts, a table to read, a picture with the right colours at the right places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from fusiontree.errors import DataError
from fusiontree.eval.heatmap import COLOURS, draw_grids, draw_heatmap, grid_lines, is_grid, make_grid
from fusiontree.eval.task import Sample, Scored


def scored(depth: float, length: int, value: float) -> Scored:
    return Scored(Sample("", "", (), 1, facts={"depth": depth, "length": length}), "", {"recall": value})


GRID = make_grid(
    [scored(0, 1000, 1.0), scored(0, 1000, 0.0), scored(50.5, 1000, 1.0), scored(0, 2000, 0.25)],
    "depth",
    "length",
    "recall",
)


def test_cells_are_means_in_percent_and_what_was_not_asked_is_empty() -> None:
    assert GRID["rows"] == [0, 50.5] and GRID["columns"] == [1000, 2000]
    assert GRID["cells"] == [[50.0, 25.0], [100.0, None]] and GRID["counts"] == [[2, 1], [1, 0]]
    assert is_grid(GRID) and not is_grid([GRID]) and not is_grid({"rows": []})
    assert grid_lines(GRID) == [
        "| depth \\ length | 1000 | 2000 |", "| ---: | ---: | ---: |", "| 0 | 50 | 25 |", "| 50.5 | 100 | – |",
    ]  # fmt: skip


def test_the_picture(tmp_path: Path) -> None:
    lengths, depths = range(1000, 36_000, 1000), range(0, 101, 10)
    cells = [[100.0 if length < 18_000 else 0.0 for length in lengths] for _ in depths]
    grid = {
        "grid": "recall",
        "row": "depth",
        "rows": list(depths),
        "column": "length",
        "columns": list(lengths),
        "cells": cells,
    }
    assert draw_grids({"grid": grid, "by_length": []}, tmp_path, "ruler:x") == [tmp_path / "ruler_x_grid.png"]
    image = imread(tmp_path / "ruler_x_grid.png")[..., :3]
    height, width, _ = image.shape
    left, right = image[height // 2, width // 4], image[height // 2, int(0.7 * width)]
    assert np.allclose(left, to_rgb(COLOURS[-1]), atol=0.03), "all found"
    assert np.allclose(right, to_rgb(COLOURS[0]), atol=0.03), "nothing found"


def test_numbers_are_written_into_few_cells_and_an_empty_grid_is_refused(tmp_path: Path) -> None:
    draw_heatmap(GRID, tmp_path / "small.png", "recall")
    assert imread(tmp_path / "small.png").shape[0] > 100
    with pytest.raises(DataError, match="no cell to draw"):
        draw_heatmap(make_grid([], "depth", "length", "recall"), tmp_path / "none.png", "recall")
