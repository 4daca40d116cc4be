import numpy as np
import pytest

from xtuner.cache_dir import cache_dir
from xtuner.data.packing import order, plan_cache
from xtuner.data.packing.pack import pack
from xtuner.data.packing.plan_cache import planned

LENGTHS = np.random.default_rng(0).integers(1, 200, 500)
ORDER = order.permutation(500, "test")[:400]


@pytest.fixture(autouse=True)
def every_plan_is_kept(monkeypatch):
    monkeypatch.setattr(plan_cache, "MIN_CACHED", 0)


def refuse(*args, **kwargs):
    raise AssertionError("it is packed again")


def files():
    return sorted((cache_dir() / "packs").glob("*"))


def same(plan, other):
    return all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(plan, other, strict=True)
    )


def test_plan_is_computed_once_and_equals_packing(monkeypatch):
    wanted = pack(LENGTHS, 256, order=ORDER)
    assert same(planned(LENGTHS, 256, order=ORDER), wanted)
    monkeypatch.setattr(plan_cache, "pack", refuse)
    assert same(planned(LENGTHS, 256, order=ORDER), wanted)


def test_another_length_order_or_capacity_is_another_plan():
    longer = LENGTHS.copy()
    longer[ORDER[3]] += 1
    for lengths, capacity, drawn in (
        (LENGTHS, 256, ORDER),
        (longer, 256, ORDER),
        (LENGTHS, 257, ORDER),
        (LENGTHS, 256, ORDER[::-1]),
    ):
        assert same(planned(lengths, capacity, order=drawn), pack(lengths, capacity, order=drawn))
    assert len(files()) == 4


def of(members, starts):
    return {"members": members, "boundaries": starts}


@pytest.mark.parametrize(
    "damage",
    [
        lambda file, plan: file.write_bytes(file.read_bytes()[:-30]),
        lambda file, plan: file.write_bytes(b"no archive"),
        lambda file, plan: np.savez(file, members=plan[0]),
        lambda file, plan: np.savez(file, **of(plan[0][:-1], plan[1])),
        lambda file, plan: np.savez(file, **of(np.where(plan[0] == 3, 4, plan[0]), plan[1])),
        lambda file, plan: np.savez(file, **of(plan[0], np.delete(plan[1], 5))),
        lambda file, plan: np.savez(file, **of(plan[0], plan[1][:-1])),
    ],
)
def test_damaged_plan_is_recomputed(damage):
    wanted = planned(LENGTHS, 256, order=ORDER)
    (file,) = files()
    damage(file, wanted)
    assert same(planned(LENGTHS, 256, order=ORDER), wanted)


def test_full_disk_does_not_stop_the_run(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path / "file" / "below"))
    assert same(planned(LENGTHS, 256, order=ORDER), pack(LENGTHS, 256, order=ORDER))
