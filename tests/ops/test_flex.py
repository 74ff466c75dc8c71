"""FlexAttention's mask against the definition; uncompiled on the CPU, where it has no backward."""

import itertools

import pytest
import torch

from fusiontree.ops import attention_reference
from fusiontree.ops.flex import flex_window
from tests.models.kinds import assert_same


@pytest.mark.parametrize(
    ("length", "past", "window", "packed"), itertools.product([33, 100], [0, 7], [1, 5, 200], [False, True])
)
def test_flex_is_the_definition(length: int, past: int, window: int, packed: bool) -> None:
    torch.manual_seed(length + past + window)
    q = torch.randn(2, 4, length, 16)
    k, v = (torch.randn(2, 2, past + length, 16) for _ in "kv")
    reach = torch.randint(1, past + 2, (2, length)) + torch.arange(length) // 3 if packed else None
    for slopes in (None, torch.tensor([0.5, 0.25, 0.1, 0.01])):
        want = attention_reference(q, k, v, window, reach, slopes)
        got = flex_window(q, k, v, window, reach, {}, slopes)
        assert_same(got, want)
