"""The rules that tests/conftest.py enforces."""

import gzip
import os

import pytest
import torch
from suite_rules import id_faults, wants_gpu


@pytest.mark.parametrize(
    "fault",
    [
        repr(gzip.compress(b"a")),
        repr(object()),
        f"{id(object()):#x}",
        "ü",
        "x" * 999,
        "/tmp/pytest-of-me/pytest-7/x",
    ],
    ids=["bytes", "object", "address", "letter", "length", "place"],
)
def test_ids_that_may_change_are_found(fault):
    names = ["a.py::test_a[one]", f"a.py::test_a[{fault}]", "a.py::test_b"]
    assert id_faults(names) == names[1:2]


def test_duplicate_ids_are_detected():
    assert id_faults(["a.py::test_a", "a.py::test_b", "a.py::test_a"]) == ["a.py::test_a"]


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [("gpu", True), ("slow or gpu", True), ("not slow and not gpu", False), ("slow", False)],
)
def test_gpus_are_hidden_unless_tests_are_chosen_for_them(expression, wanted):
    assert wants_gpu(expression) is wanted


def test_no_gpu_is_seen(pytestconfig):
    if wants_gpu(pytestconfig.option.markexpr):
        pytest.skip("tests were chosen by -m gpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and torch.cuda.device_count() == 0


@pytest.mark.parametrize("time", ["first", "second"])
def test_random_numbers_do_not_depend_on_the_tests_before(time):
    assert torch.rand(()).item() == torch.rand((), generator=torch.Generator().manual_seed(0))


def test_no_module_imports_itself_through_others():
    import grimp

    graph = grimp.build_graph("xtuner")
    imported = {m: graph.find_modules_directly_imported_by(m) - {"xtuner"} for m in graph.modules}
    while leaves := [m for m, targets in imported.items() if not targets]:
        for leaf in leaves:
            del imported[leaf]
        imported = {m: targets & imported.keys() for m, targets in imported.items()}
    assert not imported, f"import cycle among {sorted(imported)}"
