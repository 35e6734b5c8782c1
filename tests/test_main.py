"""`python -m ard_jax` in surroundings that are not as they should be."""

import os
import subprocess
import sys

import pytest
from pipeline_fixtures import ROOT, SMOKE, copy, files

from ard_jax.files import file_sha256


def start(*arguments, options=(), **environment):
    return subprocess.Popen(
        [sys.executable, *options, "-m", "ard_jax", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


TEACHER = "--config.sample.models=('teacher',)"


def sample(workdir):
    return "sample", "--config", SMOKE, "--workdir", workdir, TEACHER, "--config.sample.count=8"


def test_a_closed_pipe_stops_no_work(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher")
    process = start(*sample(workdir))
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read() and process.wait() == 0
    assert (workdir / "sample" / "done.json").exists()


def test_a_full_disk_under_the_output_stops_no_work(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher")
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "ard_jax", *sample(workdir)], cwd=ROOT, stdout=full, stderr=full, check=False
        )
    assert process.returncode == 0 and (workdir / "sample" / "done.json").exists()


def test_help_in_a_closed_pipe():
    process = start("--help")
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def test_a_locale_without_utf_8(pipeline, tmp_path):
    workdir, ascii_only = copy(pipeline, tmp_path, "teacher"), dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    out, err = start("teacher", "--help", **ascii_only).communicate()
    assert b"--workdir DIR" in out and err == b""
    process = start("export", "--workdir", workdir, "--model", "teacher", "--format", "pipeline", **ascii_only)
    out, err = process.communicate()
    assert process.returncode == 0 and b"Traceback" not in err
    assert "Schönfeld" in (workdir / "export" / "teacher" / "pipeline" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("platform", ["cuda", "nonesuch"])
def test_a_device_that_is_not_there_is_said_at_once(tmp_path, platform):
    process = start("teacher", "--config", SMOKE, "--workdir", tmp_path, JAX_PLATFORMS=platform)
    _, err = process.communicate()
    said = err.decode().strip().splitlines()[-1]
    assert process.returncode == 2 and said.startswith("ard_jax teacher: JAX finds no device to work on (")
    assert f"JAX_PLATFORMS is '{platform}'" in said and b"Traceback" not in err and not files(tmp_path)


def test_without_docstrings_and_assertions():
    process = start("teacher", "--help", options=("-OO",))
    out, err = process.communicate()
    assert process.returncode == 0 and out.startswith(b"python -m ard_jax teacher --config") and err == b""


def test_a_seed_draws_the_same_whatever_the_environment_says(pipeline, tmp_path):
    """Each of these alone changed every noise and label, which come from one generator and its types."""
    settings = dict(JAX_DEFAULT_PRNG_IMPL="rbg", JAX_THREEFRY_PARTITIONABLE="0", JAX_ENABLE_X64="1")
    workdir = copy(pipeline, tmp_path, "teacher")
    process = start("sample", "--config", SMOKE, "--workdir", workdir, TEACHER, **settings)
    _, err = process.communicate()
    assert process.returncode == 0, err
    samples = [folder / "sample" / "teacher" / "samples.npz" for folder in (pipeline, workdir)]
    assert file_sha256(samples[0]) == file_sha256(samples[1])
