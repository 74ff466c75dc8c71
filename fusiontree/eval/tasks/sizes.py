"""How much fits: the largest size that a test passes."""

from __future__ import annotations

from collections.abc import Callable


def largest(fits: Callable[[int], bool], smallest: int, most: int | None = None) -> int | None:
    """The largest size from `smallest` to `most` that fits, None when not even the smallest does.

    Doubles until something does not fit, then halves the interval; taken for granted is that all below a size that
    fits fit too.
    """
    if not fits(smallest):
        return None
    good, step = smallest, smallest
    while most is None or good < most:
        size = good + step if most is None else min(good + step, most)
        if not fits(size):
            break
        good, step = size, 2 * step
    else:
        return good
    bad = size
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good
