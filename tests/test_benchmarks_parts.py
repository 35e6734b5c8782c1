"""The table of parts counts each second once, in the innermost part, and its functions are those that there are."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import parts
from benchmarks.parts import Recorder, Span


def test_a_second_counts_once_and_innermost():
    outer, inner, within, beside = Span(0, 10, "a"), Span(2, 6, "b"), Span(3, 4, "c"), Span(7, 8, "b")
    own = dict(parts.own_seconds([inner, beside, within, outer]))
    assert own == {outer: 5, inner: 3, within: 1, beside: 1}
    assert sum(own.values()) == 10


def test_a_part_that_begins_a_little_before_the_one_around_it_takes_no_more_than_it_has():
    assert [seconds for _, seconds in parts.own_seconds([Span(1, 5, "a"), Span(4, 5.5, "b")])] == [3, 1.5]


def test_what_lies_in_no_stage_is_not_counted():
    stages = [Span(0, 10, "teacher"), Span(10, 15, "distill")]
    spans = [Span(1, 4, "steps"), Span(2, 3, "compile"), Span(11, 12, "steps"), Span(20, 30, "compile")]
    assert parts.by_stage(stages, spans) == {
        "teacher": {"rest": 7, "steps": 2, "compile": 1},
        "distill": {"rest": 4, "steps": 1},
    }


def test_the_table_has_sums_and_the_share_of_what_is_no_work():
    text = parts.report(
        {"teacher": {"steps": 6.0, "compile": 1.0, "rest": 1.0}, "sample": {"import": 1.0, "rest": 1.0}}
    )
    header, _, *rows, _, share = text.splitlines()
    assert [word.strip() for word in header.strip("|").split("|")] == [
        "seconds",
        "import",
        "compile",
        "steps",
        "rest",
        "sum",
    ]
    assert rows[-1] == "| all | 1.0 | 1.0 | 6.0 | 2.0 | 10.0 |"
    assert share.endswith(": 20.0%")


def test_what_ran_beside_each_other_counts_once(monkeypatch):
    monkeypatch.setattr(parts, "processors", lambda: [0, 1])
    text = parts.report(
        {"teacher": {"steps": 6.0}}, {"distill ard": {"compile": 1.0, "steps": 3.0}, "distill step": {"steps": 4.0}}
    )
    *_, ard, step, total, _, share = text.splitlines()
    assert ard == "| distill ard | 1.0 | 3.0 | 4.0 |" and step == "| distill step | 0.0 | 4.0 | 4.0 |"
    assert total == "| all | 0.5 | 9.5 | 10.0 |" and share.endswith(": 5.0%")


def test_all_of_its_functions_are_there():
    for place, name in parts.FUNCTIONS:
        assert callable(getattr(parts.find(place), name))
    assert {*parts.EVENTS.values(), *parts.FUNCTIONS.values()} <= {*parts.PARTS}


def test_jax_tells_of_the_events(monkeypatch):
    monkeypatch.setattr(parts, "FUNCTIONS", {})
    monkeypatch.setattr(parts, "LEAST", 0.0)
    monkeypatch.setattr(parts.command_line, "run_stage", parts.command_line.run_stage)
    monkeypatch.setattr(parts.Meter, "waiting", parts.Meter.waiting)
    recorder = Recorder()
    recorder.install()
    jax.block_until_ready(jax.jit(lambda x: jnp.sin(x) * 3)(jnp.ones(7)))
    assert {span.part for span in recorder.spans} >= {"trace", "lower", "compile"}


@pytest.mark.parametrize("fails", [False, True])
def test_a_wrapped_function_is_noted_whatever_comes_of_it(monkeypatch, fails):
    monkeypatch.setattr(parts, "LEAST", 0.0)
    recorder = Recorder()

    def work():
        if fails:
            raise KeyError
        return 3

    wrapped = recorder.wrap(work, "steps")
    if fails:
        with pytest.raises(KeyError):
            wrapped()
    else:
        assert wrapped() == 3
    assert [span.part for span in recorder.spans] == ["steps"]
