"""Small files: they are whole on the disk before they have their names, and a damaged one ends in a sentence."""

import itertools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from pipeline_fixtures import ROOT, copy, files, sentence, smoke

from ard_jax import files as our_files
from ard_jax.errors import UserError
from ard_jax.files import find_repository, locked, read_json, read_json_lines, require_finite, whole_folder, write_json
from ard_jax.workdir import Done

DAMAGE = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "zeros": lambda text: "\0" * len(text),
    "a list": lambda text: "[]",
    "numbers": lambda text: json.dumps({key: 3 for key in json.loads(text)}),
}
# A file of the run, and the stage that reads it.
READ = {
    "teacher/config.json": "trajectories",
    "teacher/done.json": "trajectories",
    "trajectories/manifest.json": "distill",
    "trajectories/1.0.0/features.json": "distill",
    "distill/ard/config.json": "evaluate",
    "distill/ard/done.json": "sample",
    "sample/done.json": "evaluate",
    "evaluate/results.json": "report",
}


# Every file in one way, and one of them in all.
PAIRS = {*zip(READ, itertools.cycle(DAMAGE)), *itertools.product(["teacher/config.json"], DAMAGE)}


@pytest.mark.parametrize(("file", "damage"), sorted(PAIRS))
def test_a_damaged_file_is_named_in_a_sentence(pipeline, tmp_path, file, damage):
    workdir = copy(pipeline, tmp_path, "teacher", "trajectories", "distill", "sample", "evaluate")
    text = (workdir / file).read_text()
    (workdir / file).write_text(DAMAGE[damage](text))
    overrides = ["student.name=another"] if READ[file] == "distill" else []
    said = sentence(smoke(READ[file], workdir, *overrides), READ[file], last=True)
    assert (file.rpartition("/")[2] if "features" in file else str(workdir / file)) in said


def test_a_shard_s_damaged_description_is_written_anew(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher", "trajectories")
    file = workdir / "trajectories" / "shards" / "00001.json"
    whole = file.read_bytes()
    file.write_bytes(b"")
    (workdir / "trajectories" / "done.json").unlink()
    assert smoke("trajectories", workdir).status == 0
    assert file.read_bytes() == whole


def test_damaged_lines_of_metrics_are_cut_out(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher")
    file = workdir / "teacher" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_bytes("".join(lines[:2]).encode() + b"\0" * 99 + b"\n3\n" + lines[2][:9].encode())
    (workdir / "teacher" / "done.json").unlink()
    assert smoke("teacher", workdir).status == 0
    assert file.read_text() == "".join(lines[:2])
    assert [line["step"] for line in read_json_lines(file)] == [5, 10]


def test_what_is_read_has_the_keys_that_nobody_asks_for(tmp_path):
    write_json(tmp_path / "done.json", {"sha256": {"a": "b"}, "more": 1})
    assert read_json(tmp_path / "done.json", Done) == {"sha256": {"a": "b"}, "more": 1}
    write_json(tmp_path / "done.json", {"sha256": {"a": 1}})
    with pytest.raises(UserError, match="done.json is damaged .*sha256"):
        read_json(tmp_path / "done.json", Done)


def test_bytes_are_on_the_disk_before_a_file_has_its_name(tmp_path, monkeypatch):
    """fsync of the file or of all in a folder, then the rename, then fsync of the folder with the name in it."""
    done, fsync, replace = [], os.fsync, os.replace
    name = lambda handle: os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(name(handle)), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("renamed"), replace(old, new)))
    write_json(tmp_path / "a.json", {})
    assert done[0].startswith(".partial-") and done[1:] == ["renamed", tmp_path.name]
    done.clear()
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "x").write_text("x")
    assert done == ["x", "renamed", tmp_path.name]


HOLD = """
import pathlib, sys
from ard_jax.files import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


def holder(path):
    """A process that has the lock when this returns, until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_in_use_says_by_whom_and_a_dead_process_is_no_obstacle(tmp_path):
    workdir = tmp_path / "run"
    process = holder(workdir / "teacher" / ".lock")
    said = sentence(smoke("teacher", workdir), "teacher")
    assert f"{workdir / 'teacher'} is in use by process {process.pid} on " in said
    assert files(workdir / "teacher") == [".lock"]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert files(workdir / "teacher") == [".lock"]  # nobody has it
    assert smoke("teacher", workdir, "teacher.steps=1").status == 0
    assert ".lock" not in files(workdir / "teacher")


def test_a_lock_is_free_again_when_its_block_ends(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "lock"), pytest.raises(UserError, match="in use"), locked(tmp_path / "lock"):
            pass
    assert not files(tmp_path)


ADD = """
import pathlib, sys
from ard_jax.workdir import merge_done
for number in range(25):
    merge_done(pathlib.Path(sys.argv[1]), {f"{sys.argv[2]}_{number}": {"sha256": {}, "seconds": 1.0}})
"""


def test_stages_that_end_at_once_lose_no_entry(tmp_path):
    started = [
        subprocess.Popen([sys.executable, "-c", ADD, tmp_path, name], cwd=ROOT, stdout=subprocess.DEVNULL)
        for name in ("a", "b")
    ]
    assert [process.wait() for process in started] == [0, 0]
    assert len(read_json(tmp_path / "done.json")["models"]) == 50


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_named(bad):
    require_finite("['a']", np.ones(3, np.float32))
    with pytest.raises(UserError, match=r"\['a'\] hold 1 numbers that are NaN or infinite, of 3"):
        require_finite("['a']", np.array([1, bad, 1], np.float32))


def test_the_repository_of_an_installed_package_is_where_one_stands(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_repository() == ROOT  # that of this tree, wherever one stands
    monkeypatch.setattr(our_files, "PACKAGE", tmp_path / "site-packages" / "ard_jax")
    assert find_repository() == tmp_path / "site-packages"  # neither
    monkeypatch.chdir(ROOT)
    assert find_repository() == ROOT
