"""The stage report: what it reads of an evaluation, and what it leaves where it refuses."""

import numpy as np
import pytest
from pipeline_fixtures import done, files, sentence, smoke

from ard_jax.files import read_json, write_json, write_npz
from ard_jax.report import teaser
from ard_jax.results import read_results

RNG = np.random.default_rng(0)
POINTS = {name: RNG.integers(0, 256, (3, 2, 8, 8, 1), dtype=np.uint8) for name in ("teacher", "ard")}
MODELS = {"teacher": {"kind": "teacher", "fd": 1.0}, "ard": {"kind": "student", "mask": "causal", "fd": 2.0}}
GALLERY = {
    "label": np.array(["older words"]),
    "held_out": np.array([False]),
    **{name: RNG.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8) for name in MODELS},
}


def write_evaluation(workdir, names, drawn=("teacher", "ard"), more=()):
    """What evaluate leaves of these models, and says that it made with these files more."""
    folder = workdir / "evaluate"
    write_json(folder / "results.json", {"samples": 3, "models": {name: MODELS[name] for name in names}})
    write_npz(folder / "pictures.npz", label=np.arange(3), **{name: POINTS[name] for name in drawn})
    write_npz(folder / "edits.npz")
    made = ("results.json", "pictures.npz", "edits.npz", *more)
    write_json(folder / "done.json", {"sha256": dict.fromkeys(made, ""), "seconds": 1.0})


def test_the_times_are_of_every_stage_that_was_run(tmp_path):
    write_evaluation(tmp_path, ["teacher", "ard"])
    folders = {"teacher": 3.0, "latents": 5.0, "captions": 7.0}
    for folder, seconds in folders.items():
        write_json(tmp_path / folder / "done.json", {"sha256": {}, "seconds": seconds})
    write_json(tmp_path / "sample" / "done.json", {"sha256": {}, "models": {"ard": {"sha256": {}, "seconds": 2.0}}})
    assert smoke("report", tmp_path).status == 0
    told = read_json(tmp_path / "report" / "results.json")["seconds"]
    assert list(told.items()) == [
        ("captions", 7.0), ("encode", 5.0), ("teacher", 3.0), ("sample/ard", 2.0), ("evaluate", 1.0)
    ]  # fmt: skip
    assert "encode" in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.parametrize("gallery", [False, True])
def test_pictures_of_an_earlier_evaluation_are_not_shown(tmp_path, gallery):
    write_evaluation(tmp_path, ["teacher", "ard"], more=["gallery.npz"] if gallery else [])
    write_npz(tmp_path / "evaluate" / "gallery.npz", **GALLERY)
    assert smoke("report", tmp_path).status == 0
    assert ("older words" in (tmp_path / "report" / "index.html").read_text()) == gallery
    expected = teaser(POINTS, read_results(tmp_path), GALLERY if gallery else {})
    assert (tmp_path / "report" / "teaser.png").read_bytes() == expected


def test_a_teacher_alone_has_a_report_without_the_picture_of_students(tmp_path):
    write_evaluation(tmp_path, ["teacher", "ard"])
    assert smoke("report", tmp_path).status == 0
    assert sorted(done(tmp_path / "report")["sha256"]) == ["index.html", "results.json", "teaser.png"]
    write_evaluation(tmp_path, ["teacher"], drawn=["teacher"])
    outcome = smoke("report", tmp_path)
    assert outcome.status == 0 and "teaser.png is left out" in outcome.err
    assert files(tmp_path / "report") == ["done.json", "index.html", "results.json"]
    assert sorted(done(tmp_path / "report")["sha256"]) == ["index.html", "results.json"]
    assert "ard" not in read_json(tmp_path / "report" / "results.json")


def test_what_is_refused_leaves_the_last_report_as_it_was(tmp_path):
    """Pictures of the student are missing: the page could be made without them, the picture for a README not."""
    write_evaluation(tmp_path, ["teacher", "ard"])
    assert smoke("report", tmp_path).status == 0
    before = {name: (tmp_path / "report" / name).read_bytes() for name in files(tmp_path / "report")}
    write_evaluation(tmp_path, ["teacher", "ard"], drawn=["teacher"])
    assert "The README picture needs" in sentence(smoke("report", tmp_path, "report.title=Other"), "report", last=True)
    assert {name: (tmp_path / "report" / name).read_bytes() for name in files(tmp_path / "report")} == before
