"""Stages that are really killed, in processes of their own, end like those that were not."""

import contextlib
import json
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
from pipeline_fixtures import STAGES, copy, done, finish, process, smoke

KILLS = {"teacher": 6, "trajectories": 2, "distill": 6, "sample": 2, "evaluate": 2, "report": 2}


def made(workdir, stage):
    """What a stage made: the hashes of done.json; of the results, which also hold times and settings, the rest."""
    hashes = done(workdir / stage)["sha256"]
    if stage == "evaluate":
        results = json.loads((workdir / "evaluate" / "results.json").read_text())
        del results["config"]  # in which the killed ones are told to log every step
        for model in results["models"].values():
            del model["seconds_per_image"]
        hashes["results.json"] = results
    return hashes if stage != "report" else None


@pytest.mark.slow
def test_a_run_killed_at_random_instants_ends_like_one_that_was_not(tmp_path):
    """The programs that users run too, compiled with every optimisation; each start goes on where the last ended."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    seconds = {}
    for stage in STAGES:
        started = time.monotonic()
        assert finish(process(stage, whole, XLA_FLAGS="")).status == 0
        seconds[stage] = time.monotonic() - started
    chance = random.SystemRandom()
    for stage in STAGES:
        kills = 0
        while kills < KILLS[stage]:
            started = time.monotonic()
            running = process(stage, killed, "run.log_every=1", XLA_FLAGS="")
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.communicate(timeout=chance.uniform(0, seconds[stage]))
            running.kill()  # which does nothing to one that has ended
            ended = finish(running)
            # `sample` has a done.json after each model, so its being there is not enough
            complete = (killed / stage / "done.json").exists() and made(killed, stage) == made(whole, stage)
            assert ended.status == -signal.SIGKILL or (complete and ended.status == 0), ended
            if complete:  # it was faster, as what it runs was compiled before
                seconds[stage] = min(seconds[stage], time.monotonic() - started)  # so that it cannot go on forever
                shutil.rmtree(killed / stage)
            kills += not complete
        assert finish(process(stage, killed, XLA_FLAGS="")).status == 0
        assert made(killed, stage) == made(whole, stage)
    for folder in ("teacher", "distill/ard"):
        lines = (killed / folder / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == sorted(set(steps)) and steps[-1] == 20


@pytest.mark.parametrize("stage", ["trajectories", "sample"])
def test_a_stage_that_does_not_train_is_asked_to_stop(pipeline, tmp_path, stage):
    """It says how to go on and ends well, and what it had begun is not there."""
    before = STAGES[: STAGES.index(stage)]
    workdir = copy(pipeline, tmp_path, *before)
    running = process(stage, workdir, "run.log_every=1")
    started = workdir / stage / ("config.json" if stage == "trajectories" else "teacher")
    while running.poll() is None and not started.exists():
        time.sleep(0.005)
    running.terminate()
    ended = finish(running)
    assert ended.status == 0, ended
    asked = re.search(rf"^{stage}: stopped; its state is saved: resume by running the same command\.$", ended.out, re.M)
    assert asked or (workdir / stage / "done.json").exists()
    assert not list(workdir.rglob("*.partial*"))
    assert smoke(stage, workdir).status == 0
    assert done(workdir / stage)["sha256"] == done(pipeline / stage)["sha256"]
