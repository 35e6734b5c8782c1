"""results.json: what is read is written again byte for byte, and an earlier file opens."""

import json

import pytest

from ard_jax.errors import UserError
from ard_jax.files import read_json, write_json
from ard_jax.results import Measured, Results, degradation_ratios, main_target, pair, read_results


def test_what_evaluate_wrote_is_written_again_byte_for_byte(pipeline, tmp_path):
    file = pipeline / "evaluate" / "results.json"
    results = read_results(pipeline)
    assert results.models["teacher"].is_teacher and results.models["ard"].steps == 3
    write_json(tmp_path / "again.json", results.to_json())
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()
    # some are of captions alone or of Inception, and half of so few samples has no distance
    others = {
        "title",
        "recall_at_1",
        "recall_at_5",
        "fd_halves",
        "fd_least",
        "fid",
        "sfid",
        "sfid_halves",
        "inception_score",
    }
    fields = set(Measured.__dataclass_fields__) - others
    assert set().union(*read_json(file)["models"].values()) == fields  # each is a key of today's file


def test_an_earlier_file_opens(tmp_path):
    found = {"samples": 8, "models": {"teacher": {"kind": "teacher", "fd": 1.5, "gone": 1}}, "degradation_ratios": None}
    write_json(tmp_path / "evaluate" / "results.json", found)
    results = read_results(tmp_path)
    assert results == Results(samples=8, models={"teacher": Measured(kind="teacher", fd=1.5)})
    assert results.to_json()["degradation_ratio"] is None and "seconds" not in results.to_json()


def test_only_students_of_as_many_steps_are_a_pair():
    """One step has no history, and is no baseline of four."""
    models = {
        "teacher": Measured(kind="teacher", fd=1.0),
        "one": Measured(kind="student", target="xt", history_layers=0, steps=1, degradation=3.0),
        "ard": Measured(kind="student", target="xt", mask="causal", history_layers=2, steps=4, degradation=2.0),
    }
    assert pair(models, "xt") == (None, "ard") and pair(models, "x0") == (None, None)
    assert degradation_ratios(models) == {}
    models["step"] = Measured(kind="student", target="xt", mask="diagonal", history_layers=2, steps=4, degradation=5.0)
    assert pair(models, "xt") == ("step", "ard") and degradation_ratios(models) == {"xt": 2.5}
    del models["ard"]
    assert pair(models, "xt") == ("one", None)


def test_a_rival_s_points_are_not_what_a_run_is_about():
    """Rivals predict x0 whatever the points of the students beside them."""
    ard = Measured(kind="student", target="xt", mask="causal")
    rival = Measured(kind="student", target="x0", objective="consistency")
    assert main_target({"teacher": Measured(kind="teacher"), "ard": ard, "rival": rival}) == "xt"
    assert main_target({"ard": ard, "other": Measured(kind="student", target="x0", mask="causal")}) == "x0"


@pytest.mark.parametrize("text", [None, "{", json.dumps([1]), json.dumps({"models": {"teacher": 3}})])
def test_what_is_no_results_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "evaluate").mkdir()
        (tmp_path / "evaluate" / "results.json").write_text(text)
    with pytest.raises(UserError, match="results.json is (missing|damaged.*): run 'evaluate' again"):
        read_results(tmp_path)
