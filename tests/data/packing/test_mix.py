from collections import Counter

import numpy as np
import pytest

from xtuner.data.packing.mix import mixed_rows, split_validation


def mixed(counts, **changes):
    options = {"repeats": None, "weights": None, "limit": None, "seed": 3, **changes}
    return mixed_rows(counts, **options)


def per_source(rows, counts):
    return np.histogram(rows, bins=np.cumsum([0, *counts]))[0].tolist()


def test_by_default_every_row_occurs_once_in_order():
    assert mixed([3, 2]).tolist() == [0, 1, 2, 3, 4]


def test_repeats_use_rows_as_often_as_asked():
    rows = mixed([10, 4, 6], repeats=(0.5, 2.25, 0))
    assert per_source(rows, [10, 4, 6]) == [5, 9, 0]
    assert max(Counter(rows.tolist()[:5]).values()) == 1
    assert sorted(Counter(rows.tolist()[5:]).values()) == [2, 2, 2, 3]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [((1, 1), [55, 55]), ((0.9, 0.1), [99, 11]), ((3, 0), [110, 0]), ((0.001, 1), [0, 110])],
)
def test_weights_keep_the_size_of_an_epoch(weights, shares):
    rows = mixed([100, 10], weights=weights)
    assert per_source(rows, [100, 10]) == shares


def test_a_limit_draws_at_random_and_keeps_the_order():
    rows = mixed([1000], limit=100)
    assert len(rows) == len(set(rows.tolist())) == 100
    assert (np.diff(rows) > 0).all()
    assert rows[-1] > 800
    assert mixed([5], limit=100).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("options", [{"limit": 10}, {"repeats": (0.5,)}, {"weights": (1,)}])
def test_the_seed_fixes_what_is_drawn(options):
    first, again = (mixed([100], **options).tolist() for _ in range(2))
    assert first == again
    if "weights" not in options:
        assert mixed([100], seed=4, **options).tolist() != first


def test_no_row_is_on_both_sides_and_none_is_lost():
    rows = mixed([50, 20], repeats=(1, 3))
    learnt, aside = split_validation(rows, ratio=0.2, seed=3)
    assert not set(learnt.tolist()) & set(aside.tolist())
    assert set(learnt.tolist()) | set(aside.tolist()) == set(range(70))
    assert len(aside) == len(set(aside.tolist())) == 14
    # the remaining ones are repeated as before
    assert Counter(learnt.tolist()) == {r: 1 if r < 50 else 3 for r in set(learnt.tolist())}


def test_a_small_ratio_sets_at_least_one_row_aside():
    assert len(split_validation(np.arange(5), ratio=0.01, seed=0)[1]) == 1
    assert len(split_validation(np.arange(5), ratio=0.0, seed=0)[1]) == 0
    assert len(split_validation(np.arange(1), ratio=0.5, seed=0)[0]) == 1
