"""A gcloud that records its calls and plays Cloud TPU in a folder; test_launch.py puts it first on PATH.

The folder $CLOUD holds
    calls              a JSON list a call
    node, queue        states that `describe` goes through, a line each; the last one stays; no file: there is none
    node.new, queue.new what `create` makes these
    create.fails, ssh.fails   what the next calls fail with, a line each
    answers            appears when the TPU is reached whatever its state
    release.after.follow  if the stages that hang shall be done as soon as the log has been looked at
    homes/N            the home folder of worker N, where `ssh --command` really runs it
The worker's own tools are stubs too, in worker/.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

CLOUD = pathlib.Path(os.environ["CLOUD"])
WORKERS = 2
# The flags that gcloud 528 knows, of those that there is any use for here.
PLACE = {"--zone", "--project", "--quiet"}
CREATE = PLACE | {"--accelerator-type", "--spot", "--network", "--subnetwork", "--service-account"}
FLAGS = {
    "tpu-vm describe": PLACE | {"--format"},
    "tpu-vm create": CREATE | {"--version"},
    "tpu-vm delete": PLACE,
    "tpu-vm ssh": PLACE | {"--worker", "--command", "--ssh-flag"},
    "tpu-vm scp": PLACE | {"--worker"},
    "queued-resources describe": PLACE | {"--format"},
    "queued-resources create": CREATE | {"--node-id", "--runtime-version"},
    "queued-resources delete": PLACE | {"--force"},
}


def fail(command: str, words: str) -> None:
    print(f"ERROR: (gcloud.compute.tpus.{command.replace(' ', '.')}) {words}", file=sys.stderr)
    sys.exit(1)


def pop(name: str, keep_last: bool = False) -> str:
    """The first line of a file, taken from it; "" if there is none."""
    path = CLOUD / name
    lines = path.read_text().splitlines() if path.exists() else []
    if len(lines) > keep_last:
        path.write_text("".join(f"{line}\n" for line in lines[1:]))
    return lines[0] if lines else ""


def home(worker: int) -> pathlib.Path:
    return CLOUD / "homes" / str(worker)


def make_workers() -> None:
    for worker in range(WORKERS):
        home(worker).mkdir(parents=True)


def delete_workers() -> None:
    for path in (CLOUD / "homes").glob("*/ard_jax_pod/run/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(path.read_text()), signal.SIGKILL)
    subprocess.run(["rm", "-rf", CLOUD / "homes"])


def on_workers(workers: list[int], command: str) -> int:
    """As sshd runs it on all at once: each in a session that is hung up when the command has ended."""
    shells = []
    for worker in workers:
        environment = {
            "HOME": str(home(worker)),
            "PATH": f"{pathlib.Path(__file__).parent / 'worker'}:/usr/bin:/bin",
            "CLOUD": str(CLOUD),
            "TMPDIR": str(CLOUD),
        }
        bash = ["bash", "-c", command]
        shells.append(subprocess.Popen(bash, cwd=home(worker), env=environment, start_new_session=True))
    statuses = []
    for shell in shells:
        statuses.append(shell.wait())
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGHUP)
    return max(statuses)


def main(arguments: list[str]) -> int:
    with open(CLOUD / "calls", "a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    assert arguments[:2] == ["compute", "tpus"], arguments
    command, words = " ".join(arguments[2:4]), [word for word in arguments[4:] if not word.startswith("--")]
    flags = dict(word.partition("=")[::2] for word in arguments[4:] if word.startswith("--"))
    if unknown := flags.keys() - FLAGS[command]:
        fail(command, f"unrecognized arguments: {unknown}")
    kind, verb = command.split()
    file = {"tpu-vm": "node", "queued-resources": "queue"}[kind]
    state = pop(file, keep_last=True) if verb == "describe" else (CLOUD / file).exists()
    if verb != "create" and not state:
        fail(command, f"NOT_FOUND: Resource 'projects/p/locations/z/{kind}/{words[0]}' was not found.")
    if verb == "describe":
        if state == "UNKNOWABLE":
            fail(command, "You do not currently have an active account selected.")
        if state == "ACTIVE" and not (CLOUD / "node").exists():
            (CLOUD / "node").write_text("READY\n")
            make_workers()
        print(state)
    elif verb == "create":
        if words := pop("create.fails"):
            fail(command, words)
        (CLOUD / file).write_text((CLOUD / f"{file}.new").read_text())
        if file == "node":
            make_workers()
    elif verb == "delete":
        for name in ("node", "answers", file):
            (CLOUD / name).unlink(missing_ok=True)
        delete_workers()
    else:
        if (CLOUD / "node").read_text() != "READY\n" and not (CLOUD / "answers").exists():
            fail(command, "The TPU is in a state in which it cannot be used.")
        if words := pop("ssh.fails"):
            fail(command, words)
        workers = list(range(WORKERS)) if flags["--worker"] == "all" else [int(flags["--worker"])]
        if verb == "scp":
            for worker in workers:
                target = home(worker) / arguments[5].partition(":")[2]
                target.write_bytes(pathlib.Path(arguments[4]).read_bytes())
        else:
            # gcloud splits the command at spaces, and ssh joins what it is given with spaces
            status = on_workers(workers, " ".join(flags["--command"].split(" ")))
            if " follow " in flags["--command"] and (CLOUD / "release.after.follow").exists():
                (CLOUD / "release").touch()
                while len(list((CLOUD / "homes").glob("*/ard_jax_pod/run/exit"))) < WORKERS:
                    time.sleep(0.05)
            return status
    return 0


sys.exit(main(sys.argv[1:]))
