"""The figures of docs/CONCEPTS.md: each draws what the data say; those that are there are small and legible."""

import re

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from pipeline_fixtures import ROOT

from ard_jax.files import read_json, write_json, write_npz
from ard_jax.report.figures import PALETTE
from benchmarks import figures

MASS = [[[1, 0, 0], [0.7, 0.3, 0], [0.2, 0.3, 0.5]], [[1, 0, 0], [0.4, 0.6, 0], [0.1, 0.1, 0.8]]]
BY_STEP = {"rollout_mse": [0.1, 0.2, 0.3], "forced_mse": [0.1, 0.05, 0.04], "given_psnr": [20.0, 21.5, 24.0]}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """With what `evaluate` left of a teacher of 5 steps and of two students of 3 in a network of 2 layers."""
    folder, rng = tmp_path_factory.mktemp("figures"), np.random.default_rng(0)
    student = {"kind": "student", "target": "x0", "steps": 3, "history_layers": 1, "attention_mass": MASS, **BY_STEP}
    step = {"mask": "diagonal", "history_layers": 0, "given_psnr": [10.0, 10.5, 12.0], "attention_mass": None}
    models = {"teacher": {"kind": "teacher"}, "mine": student | {"mask": "causal"}, "other": student | step}
    config = {"student": {"points": [3, 1, 0]}, "diffusion": {"steps": 5}, "model": {"depth": 2}}
    write_json(folder / "evaluate" / "results.json", {"models": models, "config": config})
    names = ("teacher", "teacher_xt", "mine", "other")
    drawn = {name: rng.integers(0, 256, (2, 3, 8, 8, 1), dtype=np.uint8) for name in names}
    write_npz(folder / "evaluate" / "pictures.npz", noise=drawn["mine"][:, 0] // 2, **drawn)
    return folder


@pytest.fixture(scope="module")
def drawn(workdir):
    pictures = dict(np.load(workdir / "evaluate" / "pictures.npz"))
    return figures.draw(figures.read_results(workdir), pictures), pictures


def shown(axes):
    """The pictures of some axes, None where there is none."""
    return [own.images[0].get_array()[..., 0] if own.images else None for own in axes]


def said(axes):
    return [text.get_text() for text in axes.texts]


def test_exposure_bias_is_the_errors_by_step_and_what_given_points_mend(drawn):
    left, right = drawn[0]["exposure"].axes
    lines = {line.get_label(): line for line in (*left.lines, *right.lines)}
    for title, colour, given in (
        ("step distillation", "step", [10.0, 10.5, 12.0]),
        ("ARD", "ard", BY_STEP["given_psnr"]),
    ):
        own, forced, mended = (lines[f"{title}{more}"] for more in (", its own points", ", teacher’s", ""))
        assert own.get_xydata().tolist() == [[1, 0.1], [2, 0.2], [3, 0.3]]
        assert forced.get_xydata().tolist() == [[1, 0.1], [2, 0.05], [3, 0.04]]
        assert mended.get_xydata().tolist() == [[0, given[0]], [1, given[1]], [2, given[2]]]
        assert (own.get_linestyle(), forced.get_linestyle()) == ("-", "--")
        assert {to_hex(line.get_color()) for line in (own, forced, mended)} == {PALETTE[colour][0]}
    assert len(lines) == 6


def test_masks_are_those_of_the_students(drawn):
    cells = {
        own.get_title(): {(int(patch.get_y()), int(patch.get_x())) for patch in own.patches}
        for own in drawn[0]["masks"].axes
    }
    every = {(query, key) for query in range(3) for key in range(query + 1)}
    assert cells["causal"] == every and cells["diagonal"] == {(0, 0), (1, 1), (2, 2)}
    assert cells["window"] == every - {(2, 0)} and cells["noise_and_own"] == every - {(2, 1)}


def test_attention_is_written_in_percent(drawn):
    first, second = drawn[0]["attention"].axes
    assert said(first) == ["100", "70", "30", "20", "30", "50"] and said(second)[-1] == "80"


def test_a_trajectory_is_the_teacher_s(drawn):
    built, pictures = drawn
    images = shown(built["trajectory"].axes)
    expected = [pictures["noise"][1], *pictures["teacher_xt"][1], None, *pictures["teacher"][1]]
    for image, wanted in zip(images, expected, strict=True):
        assert image is wanted is None or (image == wanted[..., 0]).all()
    heads = [own.get_title() for own in built["trajectory"].axes[:4]]
    assert heads == ["noise\n5 steps left", "3 steps left", "1 steps left", "0 steps left"]


def test_a_student_is_fed_what_it_drew(drawn):
    built, pictures = drawn
    (axes,) = built["student"].axes
    points = [pictures["noise"][1], *pictures["mine"][1]]
    images = shown(axes.child_axes)  # of each step what goes in, then what comes out
    for step in range(3):
        assert (images[2 * step] == points[step][..., 0]).all() and (
            images[2 * step + 1] == points[step + 1][..., 0]
        ).all()
    caches = [text.split(": ")[1] for text in said(axes) if "cache" in text]
    assert caches == ["nothing", "noise", "noise, 1"]
    assert {"layers 2–2", "layers 1–1\ncache: noise", "head 3", "prediction 3"} <= set(said(axes))


def test_all_are_written_and_a_run_without_the_two_students_is_refused(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "figures")
    figures.main(str(workdir))
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {path.name for path in committed()}
    results = read_json(workdir / "evaluate" / "results.json")
    del results["models"]["other"]
    write_json(tmp_path / "evaluate" / "results.json", results)
    with pytest.raises(SystemExit, match="need step distillation and ARD with x0 points, but there are"):
        figures.students(figures.read_results(tmp_path))


def committed():
    return sorted((ROOT / "docs" / "figures").iterdir())


def test_the_figures_of_the_page_are_there_and_small():
    linked = re.findall(r"\(figures/(\w+\.png)\)", (ROOT / "docs" / "CONCEPTS.md").read_text())
    assert sorted(linked) == [path.name for path in committed()]
    for path in committed():
        assert path.stat().st_size < 100_000 and 600 < Image.open(path).width < 1100, path
