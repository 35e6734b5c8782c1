"""The launch scripts: a pod is played by tests/stubs, its workers really run what reaches them."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from pipeline_fixtures import ROOT, Outcome

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
STUBS = ROOT / "tests" / "stubs"
COMMAND = ("teacher", "--config", "configs/smoke.py:student=ard", "--workdir", "gs://bucket/run")
CAPACITY = 'There is no more capacity in the zone "z"; you can try in another zone where Cloud TPU Nodes are offered'
PATIENCE = "--config.run.join_timeout=1200"  # before the user's own settings, which win
SAVED = "its state is saved: resume by running the same command"

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="needs git")


# ------------------------------------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_bash(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True).stderr == b""


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck: apt-get install shellcheck")
    scripts = [*SCRIPTS, *(STUBS / "worker").iterdir()]
    checked = subprocess.run(["shellcheck", "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_words_of_a_saved_state_are_those_of_the_command_line():
    """stage.sh tells a preempted stage by them."""
    (words,) = re.findall(r'^saved="(.*)"$', (ROOT / "launch" / "stage.sh").read_text(), re.MULTILINE)
    assert SAVED.endswith(words) and SAVED in (ROOT / "ard_jax" / "command_line.py").read_text()


# ------------------------------------------------------------------------------------------------------------- a pod


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> pathlib.Path:
    """A small repository with the launch scripts, in every state that a file can be in."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "launch", root / "launch")
    contents = {
        "requirements.txt": "-r requirements/base.txt",
        "requirements/base.txt": "jax",
        ".gitignore": "runs/\n",
        "ard_jax/stages/teacher.py": "",
        "ard_jax/stages/distill.py": "",
        "ard_jax/changed.py": "committed",
        "ard_jax/removed.py": "",
        "configs/smoke.py": "",
    }
    write(root, contents)
    environment = os.environ | {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    identity = ("-c", "user.name=n", "-c", "user.email=e")
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=root, env=environment, check=True)
    (root / "ard_jax" / "removed.py").unlink()
    new = {"ard_jax/changed.py": "here", "configs/a new one.py": "", "runs/mine/config.py": "", "runs/large.bin": ""}
    write(root, new)
    return root


def write(root: pathlib.Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


class Pod:
    """Cloud TPU as tests/stubs/gcloud.py plays it, and tpu_pod.sh against it."""

    def __init__(self, cloud: pathlib.Path, repository: pathlib.Path):
        self.cloud, self.repository = cloud, repository
        self.running = []
        (cloud / "bin").mkdir(parents=True)
        gcloud = cloud / "bin" / "gcloud"
        gcloud.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {STUBS / "gcloud.py"} "$@"\n')
        gcloud.chmod(0o755)
        self.set("node.new", "CREATING", "READY")
        self.set("queue.new", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
        self.set("plan", *["done"] * 9)

    def set(self, name: str, *lines: str) -> None:
        (self.cloud / name).write_text("".join(f"{line}\n" for line in lines))

    def ready(self) -> None:
        """A TPU that is there already."""
        self.set("node", "READY")
        for worker in (0, 1):
            (self.cloud / "homes" / str(worker)).mkdir(parents=True)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        running = subprocess.Popen(
            [self.repository / "launch" / "tpu_pod.sh", *arguments],
            env={
                "PATH": f"{self.cloud / 'bin'}:/usr/bin:/bin",
                "CLOUD": str(self.cloud),
                "HOME": str(self.cloud),
                "TMPDIR": str(self.cloud),
                "TPU_POLL": "0",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a terminal of its own, to interrupt it alone
        )
        self.running.append(running)
        return running

    def run(self, *arguments: str, **environment: str) -> Outcome:
        return end(self.start(*arguments, **environment))

    def calls(self, *verbs: str) -> list[list[str]]:
        """Every call of gcloud from its verb on, or those of some verbs."""
        path = self.cloud / "calls"
        calls = [json.loads(line)[3:] for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in calls if call[0] in verbs or not verbs]

    def order(self, *verbs: str) -> list[str]:
        return [call[0] for call in self.calls(*verbs)]

    def started(self, worker: int) -> list[list[str]]:
        """The stage and its arguments, of every start on a worker."""
        paths = sorted(self.cloud.glob(f"started.{worker}.*"))
        return [path.read_bytes().decode().split("\0")[:-1] for path in paths]

    def code(self, worker: int) -> pathlib.Path:
        return self.cloud / "homes" / str(worker) / "ard_jax_pod" / "code"

    def looks(self) -> int:
        """How often the log has been looked at."""
        return sum(" follow " in " ".join(call) for call in self.calls("ssh"))

    def wait_for(self, *names: str) -> None:
        until(lambda: all((self.cloud / name).exists() for name in names), names)

    def states(self) -> list[str]:
        """What the workers say of the command."""
        return [end(self.worker(worker, "state", *COMMAND, PATIENCE)).out.strip() for worker in (0, 1)]

    def worker(self, worker: int, *arguments: str) -> subprocess.Popen:
        """tpu_worker.sh as ssh would run it there."""
        environment = {"HOME": str(self.cloud / "homes" / str(worker)), "PATH": "/usr/bin:/bin"}
        command = ["bash", self.code(worker) / "launch" / "tpu_worker.sh", *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def close(self) -> None:
        groups = [running.pid for running in self.running if running.poll() is None]
        groups += [int(path.read_text()) for path in (self.cloud / "homes").glob("*/ard_jax_pod/run/pid")]
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def until(condition, what: object) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"{what} never came")


def end(running: subprocess.Popen) -> Outcome:
    out, err = running.communicate(timeout=240)
    return Outcome(running.returncode, out, err)


@pytest.fixture(autouse=True)
def interrupts():
    """What is started in a shell's background ignores them, and so would all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def pod(tmp_path, repository):
    pod = Pod(tmp_path / "cloud", repository)
    yield pod
    pod.close()


def last(outcome: Outcome) -> str:
    return outcome.err.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------------- a stage


def test_from_nothing_to_done(pod):
    outcome = pod.run(*COMMAND)
    assert outcome.status == 0, outcome.err
    assert outcome.out == "worker 0, start 1: done\ndone: runs/x\n"  # worker 0's log, once, and nothing else
    assert last(outcome) == "tpu_pod: done."
    assert pod.order("create", "scp", "delete") == ["create", "scp"]
    workdir = f"{pod.code(0).parent}/buckets/bucket/run"
    started = ["teacher", "--config", "configs/smoke.py:student=ard", "--workdir", workdir, PATIENCE]
    assert pod.started(0) == [started]
    assert len(pod.started(0)) == len(pod.started(1)) == 1
    assert "CREATING" in outcome.err and "READY" in outcome.err
    assert pod.states() == ["pod: exited 0"] * 2
    installed = (pod.cloud / "pip.1").read_text().splitlines()
    assert [line.split()[-1] for line in installed] == ["uv", "requirements.txt", "jax[tpu]"]
    mounted = (pod.cloud / "gcsfuse.1").read_text().split()
    assert (pod.cloud / "port.0").read_text() == "8476\n"  # the one that Cloud TPU's firewall rule lets through
    assert mounted[-1] == str(pod.code(1).parent / "buckets") and "--rename-dir-limit=100000" in mounted


def test_arguments_arrive_as_they_were_given(pod):
    pod.ready()
    awkward = [
        "--config.sample.models=('teacher', 'ard')",
        '--config.data.dir=/a  b/$HOME/`id`/$(id);"x"\\ & | > * ? ~ !',
        "--config.report.title=two\nlines, é and 'quotes'",
        "--config.vae.dir=",
        "--noconfig.trajectories.keep_noisy",
        "--config.data.name",
        "a b",
        "--config.trajectories.dir=gs://another-bucket/it's",
    ]
    outcome = pod.run(*COMMAND, *awkward)
    assert outcome.status == 0, outcome.err
    for worker in (0, 1):
        buckets = pod.code(worker).parent / "buckets"
        arrived = pod.started(worker)[0][6:]
        assert arrived == [*awkward[:-1], f"--config.trajectories.dir={buckets}/another-bucket/it's"]


def test_the_code_that_is_copied(pod):
    """What git tracks or does not ignore, as it lies here, and the config file; nothing that was there before."""
    pod.ready()
    outcome = pod.run("teacher", "--config", "runs/mine/config.py", "--workdir", "/disk", "--type", "v5litepod-8")
    assert outcome.status == 0 and "lies on the workers' own disks" in outcome.err
    for worker in (0, 1):
        code = pod.code(worker)
        assert (code / "ard_jax" / "changed.py").read_text() == "here"
        assert (code / "configs" / "a new one.py").exists() and (code / "runs" / "mine" / "config.py").exists()
        assert not (code / "ard_jax" / "removed.py").exists() and not (code / "runs" / "large.bin").exists()
    (pod.code(0) / "stale.py").touch()
    assert pod.run(*COMMAND).status == 0
    assert not (pod.code(0) / "stale.py").exists() and not (pod.code(0) / "runs").exists()
    # the environment stays, with what was installed
    assert (pod.cloud / "pip.0").read_text().count("requirements.txt") == 1


def test_a_tpu_that_is_there_is_used(pod):
    pod.ready()
    assert pod.run(*COMMAND).status == 0
    assert pod.order("create", "delete") == []


def test_buckets_are_mounted_on_all_workers_before_any_starts(pod):
    """A machine that updates itself keeps its worker waiting for many minutes, and the others would give up on it."""
    pod.ready()
    assert pod.run(*COMMAND).status == 0
    asked = [" ".join(call) for call in pod.calls("ssh")]
    mounts = [number for number, words in enumerate(asked) if "mount_buckets" in words]
    starts = [number for number, words in enumerate(asked) if "tpu_worker.sh start" in words]
    assert len(mounts) == len(starts) == 1 and mounts[0] < starts[0]
    assert pod.run("teacher", *COMMAND[1:3], "--workdir", "/disk", "--type", "v5litepod-8").status == 0
    assert sum("mount_buckets" in " ".join(call) for call in pod.calls("ssh")) == 1


# ------------------------------------------------------------------------------------------------------- preemptions


def test_a_preempted_tpu_is_made_anew_and_the_command_runs_again(pod, repository):
    pod.set("plan", "preempt", "done")
    running = pod.start(*COMMAND, "--spot", "--config.sample.models=('teacher', 'ard')")
    pod.wait_for("started.0.1")
    changed = repository / "ard_jax" / "changed.py"
    changed.write_text("later")
    outcome = end(running)
    assert (pod.code(0) / "ard_jax" / "changed.py").read_text() == "here"  # what starts again is what was started
    changed.write_text("here")
    assert outcome.status == 0, outcome.err
    assert pod.order("create", "delete", "scp") == ["create", "scp", "delete", "create", "scp"]
    assert all("--spot" in call for call in pod.calls("create"))
    first, second = pod.started(0)
    assert first == second and first[-1] == "--config.sample.models=('teacher', 'ard')"
    assert len(pod.started(1)) == 2
    assert outcome.out.endswith("worker 0, start 2: done\ndone: runs/x\n")
    assert outcome.err.count("is PREEMPTED: starting again") == 1


def test_a_crash_that_turns_out_to_be_a_preemption(pod):
    pod.set("plan", "crash", "done")
    outcome = pod.run(*COMMAND)
    assert outcome.status == 0, outcome.err
    assert pod.order("create", "delete") == ["create", "delete", "create"]


@pytest.mark.parametrize("how", ["saved", "vanish"])
def test_a_stage_that_ends_early_starts_again_where_it_was(pod, how):
    """Saved on a signal, with status 0 as if it were done; or gone without a trace, as when a worker boots anew."""
    pod.ready()
    pod.set("plan", how, "done")
    outcome = pod.run(*COMMAND)
    assert outcome.status == 0, outcome.err
    assert len(pod.started(0)) == len(pod.started(1)) == 2
    assert pod.order("create", "delete") == []
    assert {"saved": "preempted and has saved", "vanish": "left no status"}[how] in outcome.err


def test_restarts_are_counted(pod):
    pod.ready()
    pod.set("plan", "saved", "preempt", "done")
    outcome = pod.run(*COMMAND, "--restarts", "1", "--delete-when-done")
    assert outcome.status == 1
    assert "no restart is left: the same command goes on" in outcome.err
    assert len(pod.started(0)) == 2 and not (pod.cloud / "node").exists()


# ---------------------------------------------------------------------------------------------------------- failures


def test_a_stage_that_fails_is_not_tried_again(pod):
    """Its status is handed on, its words are shown whichever worker said them, and the others do not wait for it."""
    pod.ready()
    pod.set("plan.0", "hang")
    pod.set("plan.1", "fail 1")
    outcome = pod.run(*COMMAND)
    assert outcome.status == 1
    assert len(pod.started(0)) == len(pod.started(1)) == 1
    assert ": ard_jax teacher: a sentence.\ntpu_pod: the stage failed with status 1.\n" in outcome.err
    assert pod.states() == ["pod: exited 42", "pod: exited 1"]
    assert pod.order("delete") == []


def test_the_user_s_mistake_counts_more_than_what_it_brings_about(pod):
    pod.ready()
    pod.set("plan.0", "fail 1")
    pod.set("plan.1", "fail 2")
    assert pod.run(*COMMAND).status == 2
    assert len(pod.started(0)) == len(pod.started(1)) == 1


def test_no_capacity_is_waited_for(pod):
    pod.set("create.fails", CAPACITY, CAPACITY, "QUOTA")
    outcome = pod.run(*COMMAND)
    assert outcome.status == 1
    assert pod.order("create") == ["create"] * 3
    assert outcome.err.count("none to be had") == 2


def test_other_trouble_with_creating_it_is_the_end(pod):
    pod.set("create.fails", "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied")
    outcome = pod.run(*COMMAND)
    assert outcome.status == 1 and pod.order("create") == ["create"]
    assert last(outcome).startswith(
        "tpu_pod: ard-jax cannot be created: ERROR: (gcloud.compute.tpus.tpu-vm.create) PERM"
    )


def test_a_connection_that_fails_is_tried_again(pod):
    pod.ready()
    pod.set("ssh.fails", *["[/usr/bin/ssh] exited with return code [255]."] * 3)
    outcome = pod.run(*COMMAND)
    assert outcome.status == 0, outcome.err
    assert "does not answer (ERROR" in outcome.err and len(pod.started(0)) == 1


@pytest.mark.slow
def test_a_connection_that_keeps_failing_is_given_up(pod):
    """Though gcloud answers all the while; nothing is deleted, since the stage may run on."""
    pod.ready()
    pod.set("ssh.fails", *["[/usr/bin/ssh] exited with return code [255]."] * 200)
    outcome = pod.run(*COMMAND, "--delete-when-done")
    assert outcome.status == 1 and "what runs there runs on" in last(outcome)
    assert outcome.err.count("\n") < 9 and pod.order("delete") == []


def test_installing_that_fails_twice_ends_it(pod):
    pod.ready()
    pod.set("pip.fails", "ERROR: Could not find a version")
    outcome = pod.run(*COMMAND)
    assert outcome.status == 1 and pod.started(0) == []
    assert last(outcome) == "tpu_pod: installing on ard-jax failed twice: ERROR: Could not find a version"


# ------------------------------------------------------------------------------------------ attach, stop and delete


def test_the_stage_outlives_the_script_and_the_same_command_attaches(pod):
    pod.ready()
    pod.set("plan", "hang")
    first = pod.start(*COMMAND)
    pod.wait_for("started.0.1", "started.1.1")
    os.killpg(first.pid, signal.SIGKILL)
    end(first)
    assert pod.states() == ["pod: running"] * 2
    before = pod.looks()
    second = pod.start(*COMMAND)
    until(lambda: pod.looks() > before, "the second command's look at the log")
    (pod.cloud / "release").touch()
    outcome = end(second)
    assert outcome.status == 0, outcome.err
    assert "runs already on ard-jax" in outcome.err
    assert outcome.out == "worker 0, start 1: hang\ndone: runs/x\n"  # from its beginning
    assert len(pod.started(0)) == len(pod.started(1)) == 1 and pod.order("scp") == ["scp"]


def test_another_command_is_refused_while_one_runs(pod):
    pod.ready()
    pod.set("plan", "hang")
    first = pod.start(*COMMAND)
    pod.wait_for("started.0.1", "started.1.1")
    outcome = pod.run(*COMMAND, "--config.seed=1")
    assert outcome.status == 2 and "runs another command (teacher --config configs/smoke.py" in last(outcome)
    (pod.cloud / "release").touch()
    assert end(first).status == 0
    assert len(pod.started(0)) == 1


def test_interrupt_leaves_the_stage_and_stop_ends_it(pod):
    pod.ready()
    pod.set("plan", "hang")
    first = pod.start(*COMMAND)
    pod.wait_for("started.0.1", "started.1.1")
    os.killpg(first.pid, signal.SIGINT)
    outcome = end(first)
    assert outcome.status == 130
    assert last(outcome).startswith("tpu_pod: interrupted: what was started on ard-jax runs on; ")
    before = pod.looks()
    watching = pod.start(*COMMAND)
    until(lambda: pod.looks() > before, "the watch")
    assert pod.states() == ["pod: running"] * 2
    assert pod.run("--stop").status == 0
    outcome = end(watching)
    assert outcome.status == 1 and "the stage was stopped" in last(outcome)
    assert outcome.out.endswith(f"{SAVED}.\n")  # it was asked, and had the time to save
    assert pod.order("delete") == [] and len(pod.started(0)) == 1


def test_what_is_said_just_before_the_end_is_shown(pod):
    """That is, between a look at the log and the look at the workers."""
    pod.ready()
    pod.set("plan", "hang")
    (pod.cloud / "release.after.follow").touch()
    outcome = pod.run(*COMMAND)
    assert outcome.status == 0, outcome.err
    assert outcome.out == "worker 0, start 1: hang\ndone: runs/x\n"


@pytest.mark.slow
def test_the_log_is_followed_and_a_stage_that_does_not_listen_is_killed(pod):
    pod.ready()
    pod.set("plan.0", "hang")
    pod.set("plan.1", "deaf")
    running = pod.start(*COMMAND)
    pod.wait_for("started.0.1", "started.1.1")
    following = pod.worker(0, "follow", "11", "60")
    assert following.stdout.readline() == "start 1: hang\n"
    (pod.cloud / "release").touch()
    assert end(following).out == "done: runs/x\n"
    os.killpg(running.pid, signal.SIGKILL)
    until(lambda: pod.states() == ["pod: exited 0", "pod: running"], "the end of one worker")
    assert end(pod.worker(1, "stop", "1")).status == 0
    # once the last of its processes, which do not all go at once, has left the lock
    until(lambda: pod.states() == ["pod: exited 0", "pod: lost"], "the end of the other")


def test_delete(pod):
    pod.ready()
    outcome = pod.run("--delete", "--name", "mine", "--zone=z", TPU_PROJECT="p")
    assert outcome.status == 0, outcome.err
    assert pod.calls("delete") == [["delete", "mine", "--zone=z", "--project=p", "--quiet"]]
    outcome = pod.run("--delete")
    assert outcome.status == 0 and last(outcome) == "tpu_pod: there is no ard-jax."
    assert len(pod.calls("delete")) == 1


@pytest.mark.parametrize(("plan", "status"), [("done", 0), ("fail 2", 2)])
def test_delete_when_done(pod, plan, status):
    pod.ready()
    pod.set("plan", plan)
    assert pod.run(*COMMAND, "--delete-when-done").status == status
    assert pod.order("delete") == ["delete"] and not (pod.cloud / "node").exists()


def test_somebody_else_deletes_the_tpu(pod):
    """Then nobody wants it made again."""
    pod.ready()
    pod.set("plan", "hang")
    watching = pod.start(*COMMAND)
    pod.wait_for("started.0.1", "started.1.1")
    assert pod.run("--delete").status == 0
    outcome = end(watching)
    assert outcome.status == 1 and "was deleted by somebody else" in last(outcome)
    assert pod.order("create") == []


@pytest.mark.parametrize("plan", ["vanish", "saved", "fail 1"])
def test_a_stage_that_ends_since_somebody_deletes_the_tpu(pod, plan):
    """The workers go one after another, and the stage's end is seen before the TPU's."""
    pod.ready()
    pod.set("node", "READY", "DELETING")
    pod.set("answers")
    pod.set("plan", plan)
    outcome = pod.run(*COMMAND)
    assert outcome.status == 1 and "was deleted by somebody else" in last(outcome)
    assert pod.order("create") == []


# -------------------------------------------------------------------------------------------------- queued resources


def test_a_queued_resource_is_waited_for_and_made_anew_when_suspended(pod):
    pod.set("plan", "preempt", "done")
    outcome = pod.run(*COMMAND, TPU_QUEUED="1", TPU_SPOT="1", TPU_TYPE="v6e-64", TPU_SERVICE_ACCOUNT="a@b")
    assert outcome.status == 0, outcome.err
    assert pod.order("create", "delete", "scp") == ["create", "scp", "delete", "create", "scp"]
    create = [
        "create",
        "ard-jax",
        "--node-id=ard-jax",
        "--runtime-version=v2-alpha-tpuv6e",
        "--accelerator-type=v6e-64",
    ]
    assert pod.calls("create") == [[*create, "--spot", "--service-account=a@b", "--quiet"]] * 2
    assert pod.calls("delete") == [["delete", "ard-jax", "--force", "--quiet"]]
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "READY", "SUSPENDED"):
        assert f"tpu_pod: ard-jax is {state}" in outcome.err


def test_a_queued_resource_that_fails(pod):
    pod.set("queue", "FAILED")
    outcome = pod.run(*COMMAND, "--queued", "--restarts=0")
    assert outcome.status == 1 and "describe ard-jax says why" in outcome.err
    assert pod.order("create", "delete") == []


# ----------------------------------------------------------------------------------------------------------- dry run


def commands(text: str) -> list[list[str]]:
    """The dry run's lines as a shell reads them, less the scratch folder's name and what is no gcloud."""
    lines = [shlex.split(re.sub(r"tmp\.\w+", "tmp", line)) for line in text.splitlines() if line[0] != "#"]
    return [line[3:] for line in lines if line[:3] == ["gcloud", "compute", "tpus"]]


@pytest.mark.parametrize("flags", [(), ("--queued", "--spot", "--zone=z", "--network", "n", "--subnetwork=s")])
def test_the_dry_run_prints_what_a_run_would_run(pod, flags):
    arguments = (*COMMAND, "--config.sample.models=('teacher', 'ard')", *flags)
    rehearsed = pod.run(*arguments, "--dry-run", "--delete-when-done")
    assert rehearsed.status == 0 and rehearsed.err == ""
    assert pod.calls() == [] and pod.started(0) == []
    assert subprocess.run(["bash", "-n"], input=rehearsed.out, text=True).returncode == 0
    pod.run(*arguments, "--delete-when-done")
    ran = [json.loads(line)[2:] for line in (pod.cloud / "calls").read_text().splitlines()]
    ran = [[re.sub(r"tmp\.\w+", "tmp", word) for word in call] for call in ran]
    unlike = re.compile(r"follow \d+ \d+")  # from where the log is shown, and for how long
    expected = {re.sub(unlike, "follow", json.dumps(call)) for call in commands(rehearsed.out)}
    assert {re.sub(unlike, "follow", json.dumps(call)) for call in ran} == expected
    assert any(line.startswith("tar -czf ") for line in rehearsed.out.splitlines())


@pytest.mark.parametrize("action", ["--delete", "--stop"])
def test_the_dry_run_of_delete_and_stop(pod, action):
    outcome = pod.run(action, "--dry-run")
    assert outcome.status == 0 and pod.calls() == []
    assert [line[1] for line in commands(outcome.out)] == ["describe", {"--delete": "delete", "--stop": "ssh"}[action]]


@pytest.mark.parametrize(
    ("type", "runtime"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_comes_from_the_type(pod, type, runtime):
    (create,) = [line for line in commands(pod.run(*COMMAND, "--type", type, "--dry-run").out) if line[1] == "create"]
    assert f"--version={runtime}" in create and f"--accelerator-type={type}" in create
    (create,) = [line for line in commands(pod.run(*COMMAND, "--dry-run", "--runtime=mine").out) if line[1] == "create"]
    assert "--version=mine" in create


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no stage is given"),
        (("--spot",), "no stage is given"),
        (("--config.seed=1", "teacher"), "give the stage first"),
        (("teach", *COMMAND[1:]), "there is no stage 'teach'"),
        (("convert", *COMMAND[1:]), "'convert' needs one machine and no pod"),
        (COMMAND[:3], "--workdir is missing"),
        (("teacher", "--workdir", "gs://b/x"), "--config is missing"),
        ((*COMMAND[:4], ""), "--workdir lacks its value"),
        (COMMAND[:4], "--workdir lacks its value"),
        (
            ("teacher", "--config=configs/none.py", "--workdir=gs://b/x"),
            "the config file 'configs/none.py' is not there",
        ),
        (("teacher", "--config=/etc/x.py", "--workdir=gs://b/x"), "must go with the code"),
        (("teacher", "--config=configs/../../x.py", "--workdir=gs://b/x"), "must go with the code"),
        (
            (*COMMAND[:4], "/disk"),
            "the workers of a v5litepod-16 do not see each other's disks, which /disk lies on: give",
        ),
        ((*COMMAND, "--sopt"), "there is no flag --sopt"),
        ((*COMMAND, "distill"), "'distill' is not understood"),
        ((*COMMAND, "--spot=yes"), "--spot takes no value"),
        ((*COMMAND, "--restarts=many"), "--restarts is 'many'"),
        ((*COMMAND, "--poll", "1.5"), "--poll is '1.5'"),
        ((*COMMAND, "--name", "My_TPU"), "--name 'My_TPU' cannot be a TPU's"),
        ((*COMMAND, "--type", "tpu7x-8"), "no runtime is known for a TPU of type 'tpu7x-8'"),
        ((*COMMAND, "--delete"), "--delete takes no stage"),
    ],
)
def test_mistakes_end_in_one_sentence(pod, arguments, words):
    outcome = pod.run(*arguments)
    assert outcome.status == 2 and outcome.out == ""
    assert outcome.err.startswith(f"tpu_pod: {words}") or words in outcome.err
    assert outcome.err.count("\n") == 1 and pod.calls() == []


def test_variables_that_are_no_switches(pod):
    outcome = pod.run(*COMMAND, TPU_SPOT="true")
    assert outcome.status == 2 and "TPU_SPOT, TPU_QUEUED and TPU_DELETE_WHEN_DONE are 1 or 0" in outcome.err


def test_gcloud_that_is_missing(pod):
    tools = pod.cloud / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "mktemp", "rm"):
        (tools / tool).symlink_to(shutil.which(tool))
    outcome = pod.run(*COMMAND, PATH=str(tools))
    assert outcome.status == 2 and last(outcome).startswith("tpu_pod: gcloud is not there: install")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [COMMAND, ("--delete",), ("--stop",)])
def test_gcloud_that_cannot_be_asked(pod, arguments):
    pod.set("node", "UNKNOWABLE")
    outcome = pod.run(*arguments)
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert "cannot be asked about ard-jax (ERROR: (gcloud.compute.tpus.tpu-vm.describe) You do not" in outcome.err


def test_a_tpu_that_was_stopped_is_not_touched(pod):
    pod.set("node", "STOPPED")
    outcome = pod.run(*COMMAND)
    assert outcome.status == 2 and "ard-jax is stopped: start it" in last(outcome)
    assert pod.order("create", "delete") == []


def test_help_is_the_script_s_first_words(pod):
    outcome = pod.run("--help")
    assert outcome.status == 0
    text = (ROOT / "launch" / "tpu_pod.sh").read_text()
    for flag in re.findall(r"^ +(?:-h \| )?(--[\w-]+)", text.split("parse()")[1].split("check()")[0], re.MULTILINE):
        assert flag in outcome.out or flag == "--help"
    assert "set -euo" not in outcome.out and outcome.out.startswith("Runs a stage on every worker")


# --------------------------------------------------------------------------------------------- a stage under a watch


@pytest.fixture
def machine(tmp_path, repository):
    """A copy of the repository with the stubs' Python in its environment, and the environment of a job there."""
    root = shutil.copytree(repository, tmp_path / "repository")
    (root / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(STUBS / "worker" / "python3", root / ".venv" / "bin" / "python")
    installed = (root / "requirements.txt").read_text() + (root / "requirements" / "base.txt").read_text()
    (root / ".venv" / "installed-requirements.txt").write_text(installed)
    home = tmp_path / "0"
    home.mkdir()
    return {"root": str(root), "HOME": str(home), "CLOUD": str(tmp_path), "PATH": "/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("plan", "status"), [("done", 0), ("fail 2", 2), ("fail 1", 1), ("saved", 42), ("fail 143", 42)]
)
def test_the_status_of_a_stage_says_how_it_ended(machine, plan, status):
    (pathlib.Path(machine["CLOUD"]) / "plan").write_text(plan)
    ended = subprocess.run(
        ["bash", f"{machine['root']}/launch/stage.sh", "teacher", "--config.sample.models=('a', 'b')"],
        env=machine,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == status
    assert ended.stdout.startswith(f"worker 0, start 1: {plan.split()[0]}\n") and ended.stdout.count("\n") == 2
    started = (pathlib.Path(machine["CLOUD"]) / "started.0.1").read_text()
    assert started == "teacher\0--config.sample.models=('a', 'b')\0"


@pytest.mark.parametrize("whole", [False, True])
def test_a_signal_reaches_the_stage_and_its_last_words_are_shown(machine, whole):
    """It comes to the first process alone, as in a container, or to all of them, as when a machine is shut down."""
    cloud = pathlib.Path(machine["CLOUD"])
    (cloud / "plan").write_text("hang")
    running = subprocess.Popen(
        ["bash", f"{machine['root']}/launch/stage.sh", "teacher"],
        env=machine,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until((cloud / "started.0.1").exists, "the stage")
    os.killpg(running.pid, signal.SIGTERM) if whole else running.terminate()
    outcome = end(running)
    assert outcome.status == 42 and outcome.out.endswith(f"{SAVED}.\n")


def test_a_signal_that_comes_before_the_stage_starts_is_not_lost(machine):
    cloud = pathlib.Path(machine["CLOUD"])
    (cloud / "plan").write_text("hang")
    # which the script runs first of all
    write(cloud / "bin", {"mktemp": '#!/bin/sh\nkill -TERM "$PPID"\nexec /usr/bin/mktemp "$@"\n'})
    (cloud / "bin" / "mktemp").chmod(0o755)
    command = ["bash", f"{machine['root']}/launch/stage.sh", "teacher"]
    environment = machine | {"PATH": f"{cloud / 'bin'}:{machine['PATH']}"}
    assert subprocess.run(command, env=environment, capture_output=True, timeout=240).returncode == 42


# -------------------------------------------------------------------------------------------------------------- Slurm


@pytest.fixture
def slurm(machine):
    """Runs slurm.sh as Slurm does: a copy of it, elsewhere; → the outcome, and the calls of srun and scontrol."""
    cloud = pathlib.Path(machine["CLOUD"])
    (cloud / "bin").mkdir()
    record = f'#!/bin/bash\necho "$(basename "$0") $*" >>{cloud}/slurm\n'
    write(cloud / "bin", {"srun": f'{record}[[ $1 != --* ]] || shift\n"$@"\n', "scontrol": record})
    for path in (cloud / "bin").iterdir():
        path.chmod(0o755)
    spooled = shutil.copy(ROOT / "launch" / "slurm.sh", cloud / "slurm_script")

    def run(plan: str, **environment: str) -> tuple[Outcome, list[str]]:
        (cloud / "plan").write_text(plan)
        environment = {"SLURM_SUBMIT_DIR": machine["root"], "SLURM_JOB_ID": "7"} | environment
        command = ["bash", spooled, *COMMAND]
        environment = machine | {"PATH": f"{cloud / 'bin'}:/usr/bin:/bin"} | environment
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cloud)
        calls = (cloud / "slurm").read_text().splitlines() if (cloud / "slurm").exists() else []
        return Outcome(ended.returncode, ended.stdout, ended.stderr), calls

    return run


@pytest.mark.parametrize(("plan", "status"), [("done", 0), ("fail 2", 2), ("saved", 42)])
def test_slurm(slurm, plan, status):
    outcome, calls = slurm(plan, SLURM_CPUS_PER_TASK="32")
    assert outcome.status == status, outcome.err
    assert calls[0] == f"srun --cpus-per-task=32 bash launch/stage.sh {' '.join(COMMAND)}"
    assert calls[1:] == (["scontrol requeue 7"] if plan == "saved" else [])


def test_slurm_gets_gpus(slurm, machine):
    outcome, calls = slurm("done", SLURM_GPUS_ON_NODE="8", SLURM_NTASKS_PER_NODE="8")
    assert outcome.status == 0 and len(calls) == 1
    assert "jax[cuda12]" in (pathlib.Path(machine["CLOUD"]) / "pip.0").read_text()


def test_slurm_mistakes(slurm, tmp_path):
    """GPUs that no task would use; a folder that is not the repository's."""
    outcome, calls = slurm("done", SLURM_GPUS_ON_NODE="8")
    assert outcome.status == 2 and not calls
    assert outcome.err == "slurm.sh: 1 tasks a node would use so many of its 8 GPUs: give --ntasks-per-node=8.\n"
    outcome, calls = slurm("done", SLURM_SUBMIT_DIR=str(tmp_path))
    assert outcome.status == 2 and not calls and "is not the repository's folder" in outcome.err


# ---------------------------------------------------------------------------------------------------------------- GKE


def test_what_the_page_on_gke_names_exists():
    page = (ROOT / "launch" / "xpk.md").read_text()
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        assert subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True).stderr == ""
    named = set(re.findall(r"\b(?:launch|configs)/[\w/]+\.(?:sh|py)\b", page))
    assert "launch/stage.sh" in named and all((ROOT / name).exists() for name in named)
