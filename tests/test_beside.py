"""Stages beside each other: at the same time, on their share of the processors, and stopped together."""

import signal
import subprocess
import sys
import time

import pytest
from pipeline_fixtures import SMOKE, copy, done

from ard_jax import beside
from ard_jax.__main__ import main

FIRST = beside.processors()[0]
# A config that says that it is there, waits for others that say so, and does then what its argument says.
WAITING = """
import pathlib, signal, time
from ard_jax.errors import UserError

def get_config(argument):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it wherever it is
    own, others, then = argument.split(",")
    here = pathlib.Path(__file__).parent
    (here / own).touch()
    while not all((here / other).exists() for other in others.split("+")):
        time.sleep(0.01)
    if then == "pause":
        signal.pause()
    raise UserError(f"{own} has met {others}")
"""


@pytest.fixture
def waiting(tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)

    def words(*argument):
        given = ",".join(argument)
        return ["distill", "--config", f"{tmp_path / 'waiting.py'}:{given}", "--workdir", str(tmp_path / "run")]

    return words


@pytest.mark.parametrize(
    "every, count, expected",
    [([0, 1], 4, [[0], [1]]), ([0, 1, 2, 3, 6], 2, [[0, 1], [2, 3]]), ([5], 3, [[5]]), ([4, 7], 1, [[4, 7]])],
)
def test_each_has_its_share_of_the_processors(every, count, expected):
    assert beside.shares(every, count) == expected


def test_they_run_at_once_and_one_that_fails_stops_the_others(waiting, monkeypatch, capsys):
    """Neither would end if the other had not begun, and the second and third only by a signal."""
    monkeypatch.setattr(beside, "processors", lambda: [FIRST] * 3)
    commands = [
        ("a: ", waiting("a", "b+c", "fail")),
        ("b: ", waiting("b", "a", "pause")),
        ("c: ", waiting("c", "a", "pause")),
    ]
    assert beside.run_beside(commands) == (2, False)
    assert capsys.readouterr() == ("", "a: ard_jax distill: a has met b+c\n")


def test_what_has_not_begun_does_not_after_a_failure(waiting, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(beside, "processors", lambda: [FIRST])
    commands = [("a: ", waiting("a", "a", "fail")), ("b: ", waiting("b", "b", "fail"))]
    assert beside.run_beside(commands) == (2, False)
    assert capsys.readouterr() == ("", "a: ard_jax distill: a has met a\n") and not (tmp_path / "b").exists()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_all_of_them(waiting, tmp_path, number, status):
    words = [*waiting("a", "b", "pause"), "beside", *waiting("b", "a", "pause")]
    # as where the tests have one processor: a run has to have two for anything to stand beside
    code = f"import signal, sys; from ard_jax import __main__, beside; beside.processors = lambda: {[FIRST, FIRST]}"
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # some shells ignore it
    program = [sys.executable, "-c", f"{code}; {heard}; sys.exit(__main__.main(sys.argv[1:]))"]
    process = subprocess.Popen([*program, "run", *words], stdout=subprocess.PIPE, text=True)
    while not all((tmp_path / name).exists() for name in "ab"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate()
    assert process.returncode == status
    assert out.splitlines()[:2] == ["== distill (1 of 2)", "== distill (2 of 2), beside others"]


def test_on_one_processor_they_run_in_turn_in_this_process(waiting, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(beside, "processors", lambda: [FIRST])
    monkeypatch.setattr(beside, "run_beside", None)
    assert main(["run", *waiting("a", "a", "fail"), "beside", *waiting("b", "b", "fail")]) == 2
    out, err = capsys.readouterr()
    assert out == "== distill (1 of 2)\n" and err == "ard_jax distill: a has met a\n" and not (tmp_path / "b").exists()


@pytest.mark.slow
def test_students_beside_each_other_are_trained_and_sampled(pipeline, tmp_path, capsys):
    workdir = copy(pipeline, tmp_path / "run", "teacher", "trajectories")
    common = ["--workdir", str(workdir)]
    words = ["distill", "--config", str(SMOKE), *common]
    words += ["beside", "distill,sample", "--config", f"{SMOKE}:student=other", *common]
    assert main(["run", *words, "--config.sample.models=('other',)"]) == 0
    assert set(done(workdir / "distill")["models"]) == {"ard", "other"}
    assert (workdir / "sample" / "other").is_dir()
    out, err = (text.splitlines() for text in capsys.readouterr())
    assert all(line.startswith(("== ", "1: ", "2: ")) for line in out + err)
    assert {line[:3] for line in err if " step " in line} == {"1: ", "2: "}
