"""`evaluate --samples`: anybody's images, from the command line."""

import json

import numpy as np
import pytest
from inception_fixtures import random_images, write_weights
from pipeline_fixtures import run, sentence

from ard_jax.evaluation import InceptionFeatures, adm
from ard_jax.files import file_sha256

SAMPLES, REAL = random_images(16, 4), random_images(16, 4, seed=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def given(tmp_path, weights, monkeypatch):
    """The flags of files that fit each other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(weights.parent))
    np.savez(tmp_path / "samples.npz", SAMPLES)
    np.savez(tmp_path / "reference.npz", arr_0=REAL, mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32))
    return {
        "--samples": tmp_path / "samples.npz",
        "--reference": tmp_path / "reference.npz",
        "--weights": weights,
        "--split": "2",
    }


def words(flags):
    return [word for pair in flags.items() for word in pair]


@pytest.mark.parametrize("float32", [False, True])
def test_the_numbers_are_printed_and_written(tmp_path, given, weights, monkeypatch, float32):
    monkeypatch.setattr(adm, "frechet_distance", lambda a, b: 12.25)  # a root of half a minute
    outcome = run("evaluate", *words(given), "--json", tmp_path / "out" / "x.json", *["--float32"] * float32)
    assert outcome.status == 0, outcome.err
    network = InceptionFeatures.from_file(weights)
    seen, known = network(SAMPLES), network(REAL)
    precision, recall = adm.precision_recall(known.pool, seen.pool, half=not float32)
    told = json.loads((tmp_path / "out" / "x.json").read_text())
    assert told["fid"] == 12.25 and told["sfid"] is None
    assert told["inception_score"] == pytest.approx(adm.inception_score(seen.logits, 2), rel=1e-4)
    assert (told["precision"], told["recall"]) == (precision, recall)
    assert told["distances"] == ("float32" if float32 else "float16") and told["split"] == 2
    assert told["published_weights"] is False and told["weights_sha256"] == file_sha256(weights)
    assert told["samples_sha256"] == file_sha256(given["--samples"])
    lines = [line.split(maxsplit=1) for line in outcome.out.splitlines()]
    assert lines[:2] == [["FID", "12.2500"], ["sFID", "left out: the reference has nothing for it"]]
    assert f"precision        {precision:.4f}\nrecall           {recall:.4f}\n" in outcome.out
    assert "compare with no published ones" in outcome.err


@pytest.mark.parametrize(
    "change, said",
    [
        ({"--samples": "nowhere.npz"}, "nowhere.npz is not there: give an .npz file"),
        ({"--weights": "nowhere.pth"}, "nowhere.pth are not there: give weights-inception-2015-12-05"),
        ({"--split": "10"}, "of 4 samples in splits of 10"),
        ({"--split": "x"}, "the command line cannot be used (argument --split"),
        ({"--refrence": "x.npz"}, "there is no flag --refrence: did you mean --reference"),
        ({"--workdir": "runs/x"}, "there is no flag --workdir"),
    ],
)
def test_mistakes_are_one_sentence(given, change, said, tmp_path):
    outcome = run("evaluate", *words(given | change), "--json", tmp_path / "x.json")
    assert said in sentence(outcome, "evaluate") and not (tmp_path / "x.json").exists()


def test_a_flag_that_is_missing(given):
    del given["--samples"]
    assert "--samples" in sentence(run("evaluate", *words(given)), "evaluate")


def test_help_is_of_this_form():
    outcome = run("evaluate", "--samples", "--help")
    assert outcome.status == 0 and "--reference FILE.npz" in outcome.out and "ADM's evaluator" in outcome.out
    assert "python -m ard_jax evaluate --samples FILE.npz" in run("evaluate", "--help").out
