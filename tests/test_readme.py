"""What the README tells people to type works as it stands there."""

import pathlib
import re
import shlex

import numpy as np
import pytest
from pipeline_fixtures import ROOT, compile_cache, copy, done, pipeline, run  # noqa: F401 (fixtures)

from ard_jax.command_line import known_keys
from ard_jax.files import read_json

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def stage_commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line)[3:] for line in lines if line.startswith("python -m ard_jax ")]


def test_the_stages_run_as_written(pipeline, tmp_path, monkeypatch):  # noqa: F811
    """Those that the shared run has finished start again on a copy of it; the baseline and its report are new."""
    monkeypatch.chdir(ROOT)
    workdir = copy(pipeline, tmp_path / "smoke", "teacher", "trajectories", "distill")
    commands = stage_commands()
    assert [command[0] for command in commands] == [
        "teacher", "trajectories", "distill", "distill", "sample", "evaluate", "report"
    ]  # fmt: skip
    for stage, *flags in commands:
        assert flags[flags.index("--workdir") + 1] == "runs/smoke"
        flags[flags.index("--workdir") + 1] = workdir
        outcome = run(stage, *flags)
        assert outcome.status == 0, outcome.err
    assert set(done(workdir / "distill")["models"]) == {"ard", "step"}
    assert read_json(workdir / "distill" / "step" / "config.json")["student"]["mask"] == "diagonal"
    assert {"teacher", "ard", "step", "degradation_ratio"} <= read_json(workdir / "report" / "results.json").keys()


def test_the_python_example_works(golden):
    names = golden("dit_tiny")
    examples = {
        "state_dict": names.state_dict(),
        "noise": np.zeros((1, 8, 8, 4), np.float32),
        "labels": np.zeros(1, np.int32),
    }
    (code,) = blocks("python")
    exec(code, examples)
    assert examples["solution"].x0.shape == examples["solution"].xt.shape == (1, 25, 8, 8, 4)


def test_what_it_names_exists():
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / link).exists(), link
    for script in re.findall(r"\b(?:launch|configs|ard_jax)/[\w/]+\.(?:sh|py)\b", README):
        assert (ROOT / script).exists(), script
    for key in re.findall(r"--config\.([\w.]+)=", README):
        assert key in known_keys(), key


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_the_two_commands_are_those_of_ci(script):
    assert f"launch/{script}" in blocks("bash")[0]
    assert f"launch/{script}" in (pathlib.Path(ROOT) / ".ci" / "run").read_text()
