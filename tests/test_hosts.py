"""Several hosts: processes of two CPU devices each, which talk through JAX's own service and Gloo."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from pipeline_fixtures import FOLDER, ROOT, SMOKE, copy, done, finish, process, smoke, write_classes

from ard_jax import hosts
from ard_jax.config import default_config
from ard_jax.errors import UserError
from ard_jax.hosts import (
    ProcessPlace,
    check_same_settings,
    check_same_workdir,
    is_fresh,
    place_by_environment,
    place_by_flags,
)
from ard_jax.training.pictures import pictures_in
from ard_jax.workdir import claim, keep_identity

TWO = ("localhost:1234", "2", "1")


def test_flags_say_the_place_among_others():
    assert place_by_flags(*TWO) == ProcessPlace(1, 2, "localhost:1234")
    assert place_by_flags(None, None, None) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((*TWO[:2], None), "--coordinator, --num-processes, --process-id belong together: give all of them, or none."),
        (("here", *TWO[1:]), "--coordinator is 'here': give HOST:PORT of process 0"),
        ((*TWO[:2], "2"), "--process-id 2 of --num-processes 2 does not work: number"),
        ((*TWO[:2], "x"), "--process-id x of --num-processes 2 does not work"),
    ],
)
def test_flags_that_do_not_work(values, said):
    with pytest.raises(UserError, match=re.escape(said)):
        place_by_flags(*values)


def test_a_host_that_is_not_there_is_said_at_once():
    with pytest.raises(UserError, match="--coordinator is 'nohost.invalid:8476', but no host of that name is found"):
        place_by_flags("nohost.invalid:8476", "2", "1")


SRUN = {  # what a task of four sees
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-4]", "SLURM_LOCALID": "0",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Sets an environment that says nothing else of Slurm and TPUs."""

    def set_to(given):
        for name in (*SRUN, "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # the batch script, no step of srun
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (SRUN, ProcessPlace(3, 4)),
        ({"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, None),  # no chips here
    ],
)
def test_the_environment_says_the_place(environment, given, place):
    environment(given)
    assert place_by_environment() == place


@pytest.mark.parametrize("name", [name for name in SRUN if name != "SLURM_STEP_NUM_TASKS"])
def test_half_of_slurm_s_variables_are_refused_in_a_sentence(environment, name):
    environment({key: value for key, value in SRUN.items() if key != name})
    with pytest.raises(
        UserError, match=f"SLURM_STEP_NUM_TASKS is '4', but {name} cannot be used: start the tasks with"
    ):
        place_by_environment()
    environment(SRUN | {"SLURM_PROCID": "x"})
    with pytest.raises(UserError, match="SLURM_PROCID cannot be used"):
        place_by_environment()


def test_a_tpu_of_several_hosts(monkeypatch):
    monkeypatch.setattr(hosts.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c")
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    assert place_by_environment() == ProcessPlace(2, 3)


def test_files_of_killed_runs_do_not_count_as_waiting(tmp_path):
    mine, other = tmp_path / "0", tmp_path / "1"
    assert not is_fresh(other, mine)
    mine.touch(), other.touch()
    assert is_fresh(other, mine)
    os.utime(other, (time.time() - 60,) * 2)
    assert not is_fresh(other, mine)


@pytest.fixture
def two_hosts(monkeypatch):
    """agree(), as host 0 of two, with what the other host says."""

    def compare(here, **other):
        def gather(mine):
            return [mine, {**mine, **other, "versions": mine["versions"] | other.get("versions", {})}]

        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(hosts.multihost_utils, "sync_global_devices", lambda name: None)
        monkeypatch.setattr(hosts, "gather_json", gather)
        check_same_settings(here)

    return compare


def test_hosts_with_different_configs(two_hosts):
    two_hosts({"seed": 0}, settings={"seed": 0})
    with pytest.raises(UserError, match=r"host 1 was started with another config \(seed 1 there, 0 on host 0\): give"):
        two_hosts({"seed": 0, "a": 1}, settings={"seed": 1, "a": 1})


def test_skews_are_said_once(two_hosts, caplog):
    two_hosts({})
    assert not caplog.records
    two_hosts({}, versions={"jax": "0.0.1"}, time=time.time() - 60)
    versions, clocks = (record.getMessage() for record in caplog.records)
    assert versions.startswith("the hosts have different versions of jax (0.0.1 and ")
    assert clocks == "the hosts' clocks differ by 60 seconds: their logs do too."


def test_hosts_with_other_data_write_nothing(monkeypatch, tmp_path):
    """On a first start there is nothing yet that each could compare its own with."""
    here = {"classes": ["a", "b"], "records": 80, "sha256": "0123"}
    others = {**here, "records": 24, "sha256": "4567"}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "gather_json", lambda mine: [mine, others if "records" in mine else {"teacher": "x"}])
    said = f"host 1 has other inputs for {tmp_path} than host 0 (records 24 there, 80 on host 0; sha256 '4567' there, "
    with pytest.raises(UserError, match=re.escape(said)):
        keep_identity(tmp_path, here)
    with pytest.raises(
        UserError, match=r"than host 0 \(teacher 'x' there, 'y' on host 0\): let all hosts read the same"
    ):
        claim(tmp_path, default_config(), "distill", teacher="y")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("workdir", "said"),
    [
        ("made/here", "host 1 does not see {} as host 0 does: give a folder that all hosts share"),
        ("file/here", "host 0 cannot write to {} ([Errno 20] Not a directory: "),
    ],
)
def test_a_workdir_that_is_not_for_all_hosts(monkeypatch, tmp_path, workdir, said):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "gather_json", lambda mine: [mine, False if mine is True else mine])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=re.escape(said.format(tmp_path / workdir))):
        check_same_workdir(tmp_path / workdir)
    assert not list((tmp_path / "made").rglob(".seen*"))


# ------------------------------------------------------------------------------------------- really several processes


def pod(stage, workdir, *overrides):
    """`launch/local_pod.sh 2 STAGE …`, started."""
    flags = [f"--config.{override}" for override in overrides]
    return subprocess.Popen(
        ["launch/local_pod.sh", "2", stage, "--config", SMOKE, "--workdir", workdir, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


FIFTY = ("distill.steps=50", "distill.checkpoint_every=20", "run.log_every=1", "run.sample_every=30")


@pytest.fixture(scope="module")
def made_by_a_pod(pipeline, tmp_path_factory):
    """Trajectories, student, samples and results of two processes, from the teacher of one."""
    workdir = copy(pipeline, tmp_path_factory.mktemp("pod"), "teacher")
    for stage in ("trajectories", "distill", "sample", "evaluate"):
        ended = finish(pod(stage, workdir, *FIFTY))
        assert ended.status == 0, ended.err
        assert (workdir / stage / "done.json").exists()
    return workdir


@pytest.mark.slow
def test_a_pod_makes_what_one_process_makes(made_by_a_pod, pipeline, tmp_path):
    """Two processes of two devices, and one of four: the same records, losses within rounding, the same images."""
    assert done(made_by_a_pod / "trajectories")["sha256"] == done(pipeline / "trajectories")["sha256"]
    copy(pipeline, tmp_path, "teacher", "trajectories")
    four = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    alone = finish(process("distill", tmp_path, *FIFTY, XLA_FLAGS=four))
    assert alone.status == 0, alone.err
    pods, ones = losses(made_by_a_pod / "distill" / "ard"), losses(tmp_path / "distill" / "ard")
    assert len(pods) == len(ones) == 50
    np.testing.assert_allclose(pods, ones, rtol=1e-6)
    pods, ones = (pictures_in(workdir / "distill" / "ard") for workdir in (made_by_a_pod, tmp_path))
    assert list(pods) == list(ones) == [0, 30, 50]
    for step, path in pods.items():
        difference = np.abs(np.asarray(Image.open(path)).astype(int) - np.asarray(Image.open(ones[step])))
        assert difference.max() <= 1, step
    shutil.rmtree(tmp_path / "distill")
    copy(made_by_a_pod, tmp_path, "distill")
    assert smoke("sample", tmp_path, *FIFTY).status == 0
    with (
        np.load(tmp_path / "sample/ard/samples.npz") as ones,
        np.load(made_by_a_pod / "sample/ard/samples.npz") as pods,
    ):
        np.testing.assert_array_equal(pods["labels"], ones["labels"])
        difference = np.abs(pods["arr_0"].astype(int) - ones["arr_0"])
        assert difference.max() <= 1  # grey levels; the batches are of other sizes
    models = json.loads((made_by_a_pod / "evaluate" / "results.json").read_text())["models"]
    assert models["ard"]["steps"] == 3 and models["ard"]["fd"] > 0


@pytest.mark.slow
def test_a_pod_that_is_stopped_goes_on_to_the_same_bits(made_by_a_pod, tmp_path):
    """SIGTERM reaches all processes at different steps; all save after the same one."""
    copy(made_by_a_pod, tmp_path, "teacher", "trajectories")
    running = pod("distill", tmp_path, *FIFTY)
    metrics = tmp_path / "distill" / "ard" / "metrics.jsonl"
    while running.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 4):
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    stopped = finish(running)
    assert stopped.status == 0, stopped.err
    said = re.findall(r"distill: stopped at step (\d+) of 50; its state is saved: resume by running the", stopped.out)
    assert len(said) == 2 and len(set(said)) == 1 and 4 < int(said[0]) < 50, stopped.out
    assert not (tmp_path / "distill" / "done.json").exists()
    resumed = finish(pod("distill", tmp_path, *FIFTY))
    assert resumed.status == 0, resumed.err
    assert f"resuming at step {said[0]} of 50." in resumed.err
    assert done(tmp_path / "distill")["sha256"] == done(made_by_a_pod / "distill")["sha256"]


@pytest.mark.slow
def test_a_picture_that_one_host_cannot_read_costs_no_step(tmp_path):
    """The other has sent steps ahead by then; both save the last one for which all pictures were there, and end."""
    given = write_classes(tmp_path / "data", count=32)
    settings = [*FOLDER, given, "teacher.steps=40", "teacher.checkpoint_every=40", "run.in_memory=0"]
    settings += ["teacher.batch_size=4", "run.log_every=7"]
    workdir, broken = tmp_path / "run", tmp_path / "data" / "b" / "3.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"broken" + whole[6:])

    stopped = finish(pod("teacher", workdir, *settings))
    assert stopped.status == 2, stopped
    (step,) = [int(path.name) for path in (workdir / "teacher" / "checkpoints").glob("[0-9]*")]
    both = stopped.out + stopped.err
    said = re.findall(r"stopped at step (\d+), which is saved", both)
    assert said == [str(step)] * 2 and 0 < step < 16, stopped  # 16 steps read each picture once
    sentences = re.findall(r"^(?:\[1\] )?ard_jax teacher: (host \d stopped: )?.*" + str(broken), both, re.M)
    assert sorted(map(bool, sentences)) == [False, True], stopped

    broken.write_bytes(whole)
    resumed = finish(pod("teacher", workdir, *settings))
    assert resumed.status == 0 and f"resuming at step {step} of 40." in resumed.err, resumed
    assert finish(pod("teacher", tmp_path / "other", *settings)).status == 0
    assert done(workdir / "teacher")["sha256"] == done(tmp_path / "other" / "teacher")["sha256"]

    broken.write_bytes(b"broken" + whole[6:])
    stopped = finish(pod("teacher", tmp_path / "first", *settings, "teacher.batch_size=64"))  # all of them in a batch
    assert stopped.status == 2 and (stopped.out + stopped.err).count(str(broken)) == 2, stopped
    assert not list((tmp_path / "first" / "teacher" / "checkpoints").glob("[0-9]*"))


def by_flags(index, count, port, workdir, *overrides, cwd=ROOT):
    """One process of a pod, which finds the others by flags."""
    flags = [f"--config.{override}" for override in overrides]
    place = ["--coordinator", f"localhost:{port}", "--num-processes", str(count), "--process-id", str(index)]
    return subprocess.Popen(
        [sys.executable, "-m", "ard_jax", "teacher", "--config", SMOKE, "--workdir", workdir, *flags, *place],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def port():
    """A free port of localhost."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


@pytest.mark.slow
def test_a_host_that_never_joins_is_named(tmp_path, port):
    running = [by_flags(index, 3, port, tmp_path, "run.join_timeout=8.0") for index in (0, 2)]
    for ended in [finish(one) for one in running]:
        assert ended.status == 2
        assert "ard_jax: host 1 has not joined the 3 that this run has within 8 seconds: see why" in ended.err
    assert not (tmp_path / "teacher").exists()


@pytest.mark.slow
def test_hosts_that_were_started_differently_all_stop(tmp_path, port):
    running = [by_flags(index, 2, port, tmp_path, f"seed={index}") for index in (0, 1)]
    for ended in [finish(one) for one in running]:
        assert ended.status == 2, ended
        assert "host 1 was started with another config (seed 1 there, 0 on host 0): give all hosts the" in ended.err
    assert not (tmp_path / "teacher").exists()


@pytest.mark.slow
def test_hosts_that_do_not_share_the_workdir_all_stop(tmp_path, port):
    running = [by_flags(index, 2, port, tmp_path / str(index)) for index in (0, 1)]
    for index, ended in enumerate([finish(one) for one in running]):
        assert ended.status == 2, ended
        assert f"ard_jax teacher: host 1 does not see {tmp_path / '0'} as host 0 does: give a folder that" in ended.err
        assert not list((tmp_path / str(index)).glob("[.t]*"))  # neither what was written to see it, nor a teacher


@pytest.mark.slow
def test_a_pod_is_asked_to_stop_before_its_first_step(pipeline, tmp_path):
    """While it reads its checkpoint and compiles, which takes minutes of a large network."""
    copy(pipeline, tmp_path, "teacher")
    running = pod("teacher", tmp_path, "teacher.steps=1000", "teacher.checkpoint_every=1000", "run.log_every=100")
    assert any("resuming at step 20 of 1000." in line for line in running.stderr)
    running.send_signal(signal.SIGTERM)
    ended = finish(running)
    assert ended.status == 0, ended
    said = re.findall(r"teacher: stopped at step (\d+) of 1000; its state is saved", ended.out)
    assert len(said) == 2 and len(set(said)) == 1 and 20 < int(said[0]) < 1000, ended
    assert (tmp_path / "teacher" / "checkpoints" / said[0]).exists()


ONE_CANNOT_READ = """
import os, pathlib, sys
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ard_jax.parallel import make_mesh
from ard_jax.training import checkpoints
from ard_jax.training.state import TrainState

port, index, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, index, cluster_detection_method="deactivate")
place = NamedSharding(make_mesh(), PartitionSpec())

def state(step):
    step, array = jax.jit(lambda: (jnp.int32(step), jnp.arange(8.0)), out_shardings=place)()
    return TrainState(step=step, params={"w": array}, ema={"w": array}, opt_state={"m": array}, rng=array)

with checkpoints.make_manager(folder, 0) as manager:
    for step in (1, 2, 3):
        checkpoints.save(manager, state(step), {"data": {}, "seconds": 0.0})
        manager.wait_until_finished()
    if index == 0:
        checkpoints.seal(folder)
    checkpoints.wait_for_all("sealed")
    real, broken = pathlib.Path.open, {0: "3", 1: "2"}[index]

    def open(path, *arguments, **options):
        if broken in path.relative_to(folder.parent).parts:
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **options)

    pathlib.Path.open = open
    restored, _ = checkpoints.restore(manager, state(0))
    print("restored step", int(restored.step), flush=True)
    os._exit(0)
"""


@pytest.mark.slow
def test_a_checkpoint_that_one_host_cannot_read_is_passed_over_by_all(tmp_path, port):
    """Host 0 cannot read the third, and host 1 the second."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_CANNOT_READ, str(port), str(index), tmp_path / "checkpoints"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        for one in running:
            out, err = one.communicate(timeout=300)  # for the broken case alone, in which they wait for each other
            assert "restored step 1\n" in out, err
            assert "checkpoint 3 cannot be read ([Errno 5] Input/output error on host 0)" in err
            assert "checkpoint 2 cannot be read ([Errno 5] Input/output error on host 1)" in err
    finally:
        for one in running:
            one.kill()
            one.communicate()
    there = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert there == ["1", "2.unreadable", "3.unreadable"]


@pytest.mark.slow
def test_hosts_with_other_data_all_stop(tmp_path, port):
    """At the same path, as where each has a disk of its own: here a folder from which each was started."""
    for index in (0, 1):
        write_classes(tmp_path / str(index) / "data", count=4 + index)
    given = [*FOLDER, "data.dir=data"]
    running = [by_flags(index, 2, port, tmp_path / "run", *given, cwd=tmp_path / str(index)) for index in (0, 1)]
    for ended in [finish(one) for one in running]:
        assert ended.status == 2, ended
        said = (
            f"host 1 has other inputs for {tmp_path / 'run' / 'teacher'} than host 0 (records 10 there, 8 on host 0; "
        )
        assert said in ended.err
    assert not (tmp_path / "run" / "teacher" / "data.json").exists()


KEPT = """
import faulthandler, os, signal
from ard_jax.command_line import _stop_on_sigterm

faulthandler.register(signal.SIGTERM)
with _stop_on_sigterm("trajectories"):
    pass
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_handler_that_is_not_python_s_is_there_again_after_a_stage():
    """As JAX's is on several hosts, which a training in the same process is told by that it has to save."""
    ended = subprocess.run([sys.executable, "-c", KEPT], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and "most recent call first" in ended.stderr


DEFECT = """
import signal
import sys
from ard_jax.__main__ import main
from ard_jax.stages import teacher

def identify(*_):
    if sys.argv[-1] == "0":
        signal.pause()  # or it might be blocked by then in what host 1's end breaks off
    raise RuntimeError("a defect")

teacher.identify = identify
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_defect_on_one_host_ends_it_at_once(tmp_path, port):
    """An orderly end would wait for the other host, which waits for this one, while the pod is paid for."""
    given = ["teacher", "--config", SMOKE, "--workdir", tmp_path, "--coordinator", f"localhost:{port}"]
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", DEFECT, *given, "--num-processes", "2", "--process-id", str(index)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    )
    try:
        _, said = second.communicate(timeout=300)  # for the broken case alone, which takes a week
        assert second.returncode == 1 and "Traceback" in said and "RuntimeError: a defect" in said
        assert first.poll() is None  # which has not been waited for
    finally:
        first.kill(), second.kill()
        first.communicate()


def test_local_pod_says_what_it_wants():
    ended = subprocess.run(["launch/local_pod.sh", "teacher"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "give the number of processes and a stage" in ended.stderr
