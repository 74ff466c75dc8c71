import math

import pytest

from fusiontree.lab.grid.progress import GridProgress
from fusiontree.lab.grid.statistics import gradient_spikes, of_seeds, of_windows, paired


def test_windows_of_equal_length_give_the_error_of_a_mean():
    mean, error = of_windows([10.0, 20.0, 30.0, 40.0], [10] * 4)
    assert mean == 2.5 and error == pytest.approx(math.sqrt(5 / 3) / 2)
    assert of_windows([3.0], [2]) == (1.5, None)


def test_longer_windows_weigh_more():
    mean, error = of_windows([10.0, 300.0], [10, 100])
    assert mean == pytest.approx(310 / 110) and error is not None and error > 0
    assert of_windows([20.0, 200.0], [10, 100]) == (2.0, 0.0)


def test_seeds_and_their_error_the_windows_error_for_one():
    several, single = of_seeds([2.0, 4.0], 0.5), of_seeds([2.0], 0.5)
    assert (several.mean, several.error, several.over) == (3.0, 1.0, "seeds")
    assert (single.mean, single.error, single.over) == (2.0, 0.5, "windows")


def test_pairs_take_out_what_the_seeds_share():
    mean, error = paired([3.1, 5.1, 9.1], [3.0, 5.0, 9.0])
    assert mean == pytest.approx(0.1) and error == pytest.approx(0, abs=1e-9)


def test_gradient_spikes():
    assert gradient_spikes([1.0] * 20 + [3.5] + [1.0] * 5 + [2.9]) == 1
    assert gradient_spikes([1.0] * 7 + [100.0]) == 0, "too early to know what is usual"
    assert gradient_spikes([1.0] * 10 + [math.nan, math.inf, 1.0]) == 2


def test_the_time_left_is_reckoned_in_work():
    clock, shown = iter([0.0, 10.0, 40.0]), []
    progress = GridProgress(lambda done, total, text: shown.append((done, total, text)), lambda: next(clock))
    progress.expect(3, 30.0)
    progress.expect(1, 40.0)
    for cost in (10.0, 10.0, 10.0):
        progress.step("a", cost)
    # 20 units took 40 s after the warm-up, 40 are left
    assert shown == [(1, 4, "a"), (2, 4, "a, about 0:50 left"), (3, 4, "a, about 1:20 left")]
