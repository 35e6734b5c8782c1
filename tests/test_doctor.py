"""The doctor: it is quick, needs nothing but the base requirements, and names what would go wrong."""

import dataclasses
import os
import subprocess
import sys

import jax
import pytest
from pipeline_fixtures import ROOT, files, run, sentence

from ard_jax import doctor
from ard_jax.doctor import GIB, USES, Facts, examine, extras, next_steps, problems, report

WELL = Facts(
    versions={"ard_jax": "1", "Python": "3.11.7", "jax": "0.10.2"},
    platform="gpu",
    devices=["NVIDIA H100", "NVIDIA H100"],
    device_memory=80 * GIB,
    driver="570.1",
    cores=8,
    memory=64 * GIB,
    memory_free=60 * GIB,
    disk=100 * GIB,
    disk_free=50 * GIB,
    missing={extra: [] for extra in USES},
)


def without(*names):
    return {extra: ["a", "b"] if extra in names else [] for extra in USES}


def test_a_machine_that_is_well():
    assert problems(WELL) == []
    said = report(WELL).splitlines()
    assert "devices    gpu: 2 × NVIDIA H100, 80.0 GiB each, NVIDIA driver 570.1" in said
    assert "machine    8 cores, 64.0 GiB of memory, 60.0 GiB free" in said
    assert "disk here  100.0 GiB, 50.0 GiB free" in said and "not there  nothing is missing" in said
    assert "nothing that would go wrong was found." in said and len(said) <= 24


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(platform="cpu"), "there is an NVIDIA GPU, but jax is installed for the CPU alone"),
        (dict(memory=2 * GIB), "2.0 GiB of memory are little"),
        (dict(disk_free=GIB), "1.0 GiB are free on this disk"),
        (dict(writable=False), "nothing can be written in this folder"),
        (dict(missing=without("train")), "will not run without the extra train: pip install '.[train]'."),
        (dict(missing=without("text"), repository=False), "without the extra text: pip install 'ard_jax[text]'."),
        (dict(devices=(), platform="", failure="no backend"), "JAX finds no device (no backend)"),
    ],
)
def test_what_would_go_wrong_is_a_sentence(change, said):
    (found,) = problems(dataclasses.replace(WELL, **change))
    assert said in found and found.endswith(".") and f"  - {found}" in report(dataclasses.replace(WELL, **change))


def test_a_gpu_that_was_left_alone_on_purpose_is_no_problem():
    assert not problems(dataclasses.replace(WELL, platform="cpu", environment={"JAX_PLATFORMS": "cpu"}))


def test_what_to_run_next():
    def commands(**changes):
        return [line.split("  #")[0].strip() for line in next_steps(dataclasses.replace(WELL, **changes))]

    everything = ["python -m ard_jax demo", "launch/emoji.sh", "launch/quickstart.sh"]
    assert commands() == everything
    assert commands(missing=without("demo")) == [*everything[1:], "pip install '.[demo]'"]
    assert commands(missing=without("train", "demo", "emoji")) == [
        "pip install -r requirements.txt", "pip install '.[demo]'"
    ]  # fmt: skip
    assert commands(missing=without("train"), repository=False) == ["pip install 'ard_jax[train]'"]


def test_extras_are_those_of_the_requirements():
    found = extras()
    assert found.keys() == USES.keys() and found["demo"] == ["gradio"] and found["tpu"] == ["libtpu"]
    assert {"tensorflow-datasets", "scipy"} <= set(found["train"])


def test_extras_of_an_installation_without_its_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "find_repository", lambda: tmp_path)
    required = ["jax>=0.10", 'gradio>=6; extra == "demo"', 'jax[tpu]; extra == "tpu"', "torch; extra == 'convert'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: required)
    found = extras()
    assert (found["demo"], found["tpu"], found["convert"], found["train"]) == (["gradio"], ["libtpu"], ["torch"], [])


def test_what_is_here_is_what_it_says():
    facts = examine()
    assert facts.versions["jax"] == jax.__version__ and len(facts.devices) == jax.local_device_count()
    assert facts.platform == "cpu" and facts.environment["JAX_PLATFORMS"] == "cpu" and facts.repository
    assert 0 < facts.memory_free <= facts.memory and 0 < facts.disk_free <= facts.disk


def start(folder, **environment):
    program = "import sys; from ard_jax.__main__ import main; code = main(['doctor']); print([name for name in "
    program += "('tensorflow', 'matplotlib', 'gradio', 'torch') if name in sys.modules]); sys.exit(code)"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


def test_it_imports_nothing_slow_and_leaves_nothing_behind(tmp_path):
    done = start(tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]" and not files(tmp_path)
    assert len(done.stdout.splitlines()) <= 25 and "devices    cpu: 1 × cpu" in done.stdout


def test_a_device_that_is_not_there_is_said_among_the_rest(tmp_path):
    done = start(tmp_path, JAX_PLATFORMS="nonesuch")
    assert done.returncode == 0 and "devices    none" in done.stdout and "Traceback" not in done.stderr
    assert "JAX_PLATFORMS is 'nonesuch': unset it" in done.stdout and "JAX finds no device (" in done.stdout


def test_it_takes_no_flags():
    assert "there is no flag --workdir" in sentence(run("doctor", "--workdir", "x"), "doctor")
