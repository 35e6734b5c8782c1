"""Stages that are really killed, in processes of their own, end like those that were not."""

import json
import random
import re
import signal
import time

import pytest
from pipeline_fixtures import STAGES, copy, done, finish, process, smoke

KILLS = 12


def made(workdir):
    """What a run made, by stage: the hashes of done.json; of the results, which also hold times, the rest of them."""
    hashes = {stage: done(workdir / stage)["sha256"] for stage in STAGES}
    results = json.loads((workdir / "evaluate" / "results.json").read_text())
    for model in results["models"].values():
        del model["seconds_per_image"]
    del hashes["report"], hashes["evaluate"]["results.json"]
    return hashes | {"results": results}


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
    kills = dict.fromkeys(STAGES, 0)
    for stage in STAGES:
        while kills[stage] < -(-KILLS // len(STAGES)):
            running = process(stage, killed, "run.log_every=1", XLA_FLAGS="")
            time.sleep(chance.uniform(0, seconds[stage]))
            running.kill()
            ended = finish(running)
            assert ended.status in (0, -signal.SIGKILL), ended  # it may have been faster than before
            kills[stage] += ended.status != 0
        assert finish(process(stage, killed, XLA_FLAGS="")).status == 0
    assert made(killed) == made(whole)
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
