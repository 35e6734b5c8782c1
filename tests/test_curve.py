"""The curve of a run's checkpoints: its file, and which checkpoint is the best."""

import pytest

from ard_jax.curve import add_line, best_line, curve_path, line_of, read_curve, require_best
from ard_jax.errors import UserError
from ard_jax.results import Measured, Results


def line(model="ard", step=5, checkpoint="a", **measured):
    return {"model": model, "step": step, "checkpoint": checkpoint, **measured}


def everywhere(line):
    return True


def test_a_line_keeps_numbers_and_words_of_what_was_measured():
    model = Measured(fd=2.5, psnr=20.0, steps=4, kind="student", mask="causal", mse_per_step=[1.0, 2.0])
    results = Results(features="f", real_images=7, samples=6, models={"ard": model})
    assert line_of(results, "ard", 15, "b") == {
        "model": "ard", "step": 15, "checkpoint": "b", "fd": 2.5, "psnr": 20.0, "steps": 4, "kind": "student",
        "mask": "causal", "features": "f", "real_images": 7, "samples": 6,
    }  # fmt: skip


def test_lines_stand_in_order_and_none_twice(tmp_path):
    assert read_curve(tmp_path) == []
    for given in (line(step=10), line(step=5), line("teacher", 5), line(step=10, checkpoint="b")):
        lines = add_line(tmp_path, given)
    assert lines == [line(step=5), line(step=10, checkpoint="b"), line("teacher", 5)] == read_curve(tmp_path)
    assert [path.name for path in curve_path(tmp_path).parent.iterdir()] == ["curve.jsonl"]


def test_a_line_that_was_cut_is_passed_over_and_then_gone(tmp_path):
    add_line(tmp_path, line())
    with curve_path(tmp_path).open("a") as file:
        file.write('{"model": "ard", "st')
    assert read_curve(tmp_path) == [line()]
    add_line(tmp_path, line(step=10))
    assert len(curve_path(tmp_path).read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("metric", "step"), [("frechet", 10), ("fd", 10), ("precision", 5), ("psnr", 20), ("recall", None), ("fid", None)]
)
def test_the_best_checkpoint_is_that_of_the_metric(metric, step):
    """The least distance, the greatest of the others, the earliest of equals; never another model's, nor NaN."""
    lines = [
        line(step=5, fd=3.0, precision=0.5, psnr=1.0),
        line(step=10, fd=2.0, precision=0.5, psnr=2.0),
        line(step=15, fd=2.0, precision=0.4, psnr=float("nan")),
        line(step=20, fd=float("nan"), psnr=3.0),
        line("teacher", 5, fd=1.0, precision=0.9, recall=0.9, fid=0.1),
    ]
    best = best_line(lines, "ard", metric, everywhere)
    assert (best and best["step"]) == step


@pytest.mark.parametrize(("metric", "asked"), [("fd", ["b", "a", "c"]), ("precision", ["c", "a"])])
def test_the_best_is_one_of_those_that_are_there(metric, asked):
    """It is asked of no more than of those that are better than the answer, since asking may mean hashing it."""
    lines = [
        line(step=5, checkpoint="a", fd=2.0, precision=0.5),
        line(step=10, checkpoint="b", fd=1.0, precision=0.4),
        line(step=15, checkpoint="c", fd=3.0, precision=0.6),
        line(step=20, checkpoint="d", fd=4.0, precision=0.3),
    ]
    heard = []

    def is_there(line):
        heard.append(line["checkpoint"])
        return line["checkpoint"] == asked[-1]

    assert best_line(lines, "ard", metric, is_there)["checkpoint"] == asked[-1] and heard == asked
    assert best_line(lines, "ard", metric, lambda line: False) is None


def test_where_there_is_a_fid_it_is_the_frechet_distance():
    lines = [line(step=5, fd=1.0, fid=9.0), line(step=10, fd=2.0, fid=8.0)]
    assert [best_line(lines, "ard", metric, everywhere)["step"] for metric in ("frechet", "fd")] == [10, 5]


def test_no_best_checkpoint_ends_in_a_sentence(tmp_path):
    add_line(tmp_path, line(fd=1.0))
    assert require_best(tmp_path, "ard", "fd", everywhere) == line(fd=1.0)
    for metric, is_there in (("recall", everywhere), ("fd", lambda line: False)):
        said = (
            f"says nothing of 'ard' by '{metric}' that is of a checkpoint which is there now, .+: run 'watch', or give"
        )
        with pytest.raises(UserError, match=said):
            require_best(tmp_path, "ard", metric, is_there)
