import torch

from tests.ops.poison import poisoned_memory


def test_poison_poisons() -> None:
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
