"""Counting in optimizer steps and, as in XTuner 0.x, in micro-batches."""

import pytest

from xtuner.engine.counting import Counter

COURSE = Counter(
    unit="micro_batches",
    steps_per_epoch=24,
    micro_batches_per_epoch=384,
    accumulative_counts=16,
)
UNEVEN = Counter(
    unit="micro_batches", steps_per_epoch=3, micro_batches_per_epoch=9, accumulative_counts=4
)


def test_optimizer_steps_count_as_they_are():
    counter = Counter()
    assert [counter.done(step) for step in range(4)] == [0, 1, 2, 3]
    assert [counter.due(step, 3) for step in range(8)] == [None, None, None, 3, None, None, 6, None]
    assert counter.steps_for(5, most=9) == 5
    assert counter.steps_for(50, most=9) == 9


def test_the_course_saves_at_300_and_600_and_ends_at_768():
    due = {step: COURSE.due(step, 300) for step in range(1, 48)}
    assert {step: count for step, count in due.items() if count} == {18: 300, 37: 600}
    assert COURSE.done(48) == 768
    assert COURSE.of_run(300, 48) == [(300, 18), (600, 37), (768, 48)]


def test_the_last_step_of_an_epoch_may_be_smaller():
    assert [UNEVEN.done(step) for step in range(8)] == [0, 4, 8, 9, 13, 17, 18, 22]


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5, 9, 20])
def test_every_multiple_belongs_to_the_last_step_done_by_then(every):
    due = [(UNEVEN.due(step, every), step) for step in range(1, 30)]
    found = [(count, step) for count, step in due if count]
    for count, step in found:
        assert count % every == 0
        assert UNEVEN.done(step) <= count < UNEVEN.done(step + 1)
    steps = {step for step in range(1, 30) if UNEVEN.done(step + 1) > (-UNEVEN.done(step) % every)}
    multiples = range(every, UNEVEN.done(30), every)
    expected = {
        max(step for step in range(31) if UNEVEN.done(step) <= multiple) for multiple in multiples
    }
    assert {step for _, step in found} == expected - {0}
    assert steps


def test_a_run_given_in_micro_batches_takes_the_step_that_reaches_them():
    assert UNEVEN.steps_for(9, most=100) == 3
    assert UNEVEN.steps_for(10, most=100) == 4
    assert UNEVEN.steps_of(9) == 3
    assert UNEVEN.steps_of(None) is None


def test_counts_have_their_words():
    assert [Counter().words(n) for n in (1, 2000)] == ["1 step", "2,000 steps"]
    batches = Counter(unit="micro_batches")
    assert [batches.words(n) for n in (1, 2)] == ["1 micro-batch", "2 micro-batches"]
