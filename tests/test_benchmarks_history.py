"""What history has to tell: a linear map of windows finds what is there, and nothing where there is nothing."""

import re

import numpy as np
import pytest

from benchmarks import history


def draw(seed, rows=120):
    return np.random.default_rng(seed).normal(size=(rows, 6, 6, 2))


def test_windows_hold_each_pixel_s_neighbours():
    images = np.arange(2 * 3 * 4).reshape(2, 3, 4, 1).astype(float)
    found = history.windows(images, 3).reshape(2, 3, 4, 10)
    np.testing.assert_array_equal(found[1, 1, 2], [13, 14, 15, 17, 18, 19, 21, 22, 23, 1])
    np.testing.assert_array_equal(found[0, 0, 0], [0, 0, 1, 0, 0, 1, 4, 4, 5, 1])  # edges go on


def test_what_a_map_explains():
    point, noise, other = draw(0), draw(1), draw(2)
    right = np.roll(noise, -1, axis=2)
    right[:, :, -1] = noise[:, :, -1]  # the neighbour on the right, where there is one
    target = 2 * point + 3 + 1.5 * right[..., ::-1]
    assert history.explained([point, noise], target, 3) == pytest.approx(1, abs=1e-6)
    assert history.explained([point], target, 3) == pytest.approx(4 / (4 + 1.5**2), abs=0.05)
    assert abs(history.explained([point], other, 3)) < 0.05
    assert history.explained([point, noise], target, 1) < 0.75  # the neighbour is out of sight


def test_each_step_of_a_store_has_a_row(pipeline, capsys):
    assert history.main([str(pipeline / "trajectories"), "--rows", "20", "--width", "3"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[1] for row in rows] == ["2", "3", "4"]
    assert header.count("|") == rows[0].count("|") == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no whole trajectory store in .*nowhere"),
        (["x", "--rows", "4"], "--rows is 4 and --width 9: give at least 5 and 1"),
        (["x", "--rowss", "9"], "there is no flag --rowss: did you mean --rows"),
    ],
)
def test_what_cannot_be_read_is_said(arguments, said, capsys):
    assert history.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.history: ") and len(error.splitlines()) == 1
    assert re.search(said, error)
