"""What the tests of the pipeline share: the command line in this process, and one finished run of configs/smoke.py."""

import contextlib
import dataclasses
import fcntl
import functools
import io
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from ard_jax import command_line
from ard_jax.__main__ import main
from ard_jax.errors import UserError
from ard_jax.training import loop

ROOT = pathlib.Path(__file__).parent.parent
SMOKE = str(ROOT / "configs" / "smoke.py")
STAGES = ("teacher", "trajectories", "distill", "sample", "evaluate", "report")


@dataclasses.dataclass
class Outcome:
    """What a command ended with."""

    status: int
    out: str
    err: str


def run(stage: str, *arguments: str) -> Outcome:
    """`python -m ard_jax STAGE …` in this process, which saves its start-up; logging is left as it was."""
    out, err = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    handlers = root.handlers[:]
    root.handlers.clear()  # or basicConfig would close pytest's
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([stage, *map(str, arguments)])
    finally:
        root.handlers[:] = handlers
        command_line.stopped.clear()  # which a process of its own would not have met
    return Outcome(status, out.getvalue(), err.getvalue())


def smoke(
    stage: str, workdir: pathlib.Path, *overrides: str, arguments: str = "", flags: Sequence[str] = ()
) -> Outcome:
    """A stage of configs/smoke.py, with overrides such as "seed=1"."""
    settings = [f"--config.{override}" for override in overrides]
    return run(stage, "--config", f"{SMOKE}:{arguments}", "--workdir", workdir, *settings, *flags)


def process(stage: str, workdir: pathlib.Path, *overrides: str, **environment: str) -> subprocess.Popen:
    """The same in a process of its own, with changes of the environment."""
    flags = [f"--config.{override}" for override in overrides]
    return subprocess.Popen(
        [sys.executable, "-m", "ard_jax", stage, "--config", SMOKE, "--workdir", workdir, *flags],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(running: subprocess.Popen) -> Outcome:
    """Waits for a process."""
    out, err = running.communicate()
    return Outcome(running.returncode, out, err)


FOLDER = ["data.source=folder", "data.num_classes=2"]


def write_classes(root: pathlib.Path, names: Sequence[str] = ("a", "b"), count: int = 4) -> str:
    """Pictures of 8×8 grey levels in a folder a class, and the setting that says where they are."""
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(root / name / f"{number}.png")
    return f"data.dir={root}"


def in_process(program: str, devices: int) -> Any:
    """What a program prints as JSON, in a process that has so many devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def sentence(outcome: Outcome, stage: str, last: bool = False) -> str:
    """The one sentence that a user's mistake ends in; fails if there is anything else.

    Args:
        outcome, stage: of the mistake.
        last: there may be log lines before it; those that say what a folder holds always may.
    """
    assert outcome.status == 2, outcome
    said = re.sub(r"^\S+ \d+ pictures in \d+ classes.*\n", "", outcome.err.strip())
    said = said.splitlines()[-1] if last else said
    assert "\n" not in said and "Traceback" not in said, said
    assert said.startswith(f"ard_jax {stage}: ") and said.endswith("."), said
    return said


def key(outcome: Outcome, stage: str) -> str:
    """The setting that the sentence is about."""
    return UserError(sentence(outcome, stage).removeprefix(f"ard_jax {stage}: ")).key


def done(folder: pathlib.Path) -> dict:
    return json.loads((folder / "done.json").read_text())


def files(folder: pathlib.Path) -> list[str]:
    """Every file under a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def copy(source: pathlib.Path, target: pathlib.Path, *stages: str) -> pathlib.Path:
    """A workdir with some stages of another one."""
    for stage in stages:
        shutil.copytree(source / stage, target / stage)
    return target


def shared(tmp_path_factory: pytest.TempPathFactory, name: str) -> pathlib.Path:
    """A path that all workers of this run of the tests have in common."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """Every program is compiled once, in whichever process; compiling is nearly all of these tests' time."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(shared(tmp_path_factory, "compile_cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    for name, value in settings.items():
        value = os.environ.setdefault(name, value)
        jax.config.update(name.lower(), value if name.endswith("DIR") else int(value))


@pytest.fixture(scope="session", autouse=True)
def peak_flops():
    """What this machine can do is measured once, not in each run that trains."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "peak_flops", functools.cache(loop.peak_flops))
        yield


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory, compile_cache) -> pathlib.Path:
    """The workdir of a whole run of configs/smoke.py, each stage's output in STAGE.log; not to be written to.

    The first worker that asks makes it, and the others wait for the lock, which the kernel frees if that one dies.
    """
    workdir = shared(tmp_path_factory, "pipeline")
    with open(workdir.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stage in STAGES:
            log = workdir / f"{stage}.log"
            if not log.exists():
                outcome = smoke(stage, workdir)
                assert outcome.status == 0, outcome.err
                log.write_text(outcome.err + outcome.out)
    return workdir


class Compilations:
    """How many programs, and which, were compiled since it was made, or fetched from the cache of compiled ones."""

    def __init__(self):
        self.count, self.names = 0, []
        jax.monitoring.register_event_duration_secs_listener(self.hear)

    def hear(self, event, *_, fun_name="", **__):
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.names.append(fun_name)


@pytest.fixture
def compilations():
    counted = Compilations()
    yield counted
    jax.monitoring.unregister_event_duration_listener(counted.hear)
