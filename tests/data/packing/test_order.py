import numpy as np

from xtuner.data.packing import order


def test_an_order_never_changes():
    # a run may be resumed with another version of numpy, so these numbers must never change
    assert order.permutation(8, "epoch", 42, 0).tolist() == [3, 0, 7, 4, 1, 2, 6, 5]


def test_orders_hold_every_number_once_and_differ_by_key():
    first, second = order.permutation(1000, "a", 1), order.permutation(1000, "a", 2)
    assert sorted(first.tolist()) == list(range(1000))
    assert first.tolist() != second.tolist()


def test_the_numbers_are_spread_evenly():
    places = np.mean([order.permutation(10, "k", i) for i in range(4000)], axis=0)
    # the mean of 0..9 is 4.5, its standard error here 0.045
    assert np.abs(places - 4.5).max() < 0.25


def test_a_subset_is_ascending():
    assert (np.diff(order.subset(100, 30, "k")) > 0).all()
    assert order.subset(5, 9, "k").tolist() == [0, 1, 2, 3, 4]
    assert order.permutation(0, "k").tolist() == []
