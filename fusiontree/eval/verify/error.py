"""How far two answers are apart, and why a question may stay without one."""

from torch import Tensor


class NotOfferedError(Exception):
    """The model does not claim what the line asks, or says itself that it cannot: the reason."""


class ModelFailedError(Exception):
    """The model broke down where it should have answered: what it said."""


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest wanted value; a NaN counts as infinite. Shapes must be equal."""
    assert got.shape == want.shape, f"{tuple(got.shape)} instead of {tuple(want.shape)}"
    if want.numel() == 0:
        return 0.0
    want = want.double()
    off = (got.to(want.device).double() - want).abs().max() / want.abs().max().clamp_min(1e-30)
    return float("inf") if off.isnan() else off.item()
