"""Steps over flat buffers and their checkpoints are bitwise equal to those over each parameter."""

import json
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from xtuner.config.schema import Settings
from xtuner.engine.optimizer import flat as flat_optimizer
from xtuner.engine.optimizer import flat_check
from xtuner.engine.optimizer.flat import FlatOptimizer, steps_by_element
from xtuner.engine.optimizer.flat_check import fault_in_flat_steps, wants_flat_steps
from xtuner.engine.optimizer.optim import (
    clip_gradients,
    load_optimizer,
    make_optimizer,
    set_learning_rate,
)
from xtuner.engine.strategies import replicated
from xtuner.engine.training_state import load_state, save_state
from xtuner.errors import ConfigError, TrainingError
from xtuner.testing.fake_cuda import device
from xtuner.testing.run_distributed import run_distributed

LIBRARY = sorted(
    name
    for name, kind in vars(bnb.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and not name.startswith("Paged")
    and not hasattr(torch.optim, name)
)
SHAPES = ((30, 50), (80, 100), (33, 200), (100, 90), (7,), (12,), (9000,), (64, 128), (5000,))
"""Of parameters: below and above 4,096 numbers, with and without weight decay."""


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """Several buffers, and one parameter that is too large for them."""
    monkeypatch.setattr(flat_optimizer, "BUFFER", 20_000)
    monkeypatch.setattr(flat_optimizer, "LARGEST", 8_999)


def numbers(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    """Parameters with prescribed gradients."""

    def __init__(self, shapes=SHAPES, dtype=torch.float32):
        super().__init__()
        made = (nn.Parameter(numbers(i, shape).to(dtype)) for i, shape in enumerate(shapes))
        self.all = nn.ParameterList(made)


def make(name, model, *, flat):
    optimizer = make_optimizer(
        name, model, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, paged=False
    )
    return FlatOptimizer(optimizer) if flat else optimizer


def step(model, optimizer, number, missing=()):
    """Two micro-batches, clipped; `missing` parameters have no gradient."""
    optimizer.zero_grad(set_to_none=True)
    set_learning_rate(optimizer, 0.01 / (number + 1))
    for micro in range(2):
        loss = sum(
            (p * numbers(1000 * number + 100 * micro + i, p.shape).to(p.dtype)).sum()
            for i, p in enumerate(model.all)
            if i not in missing
        )
        loss.backward()
    clip_gradients(model.parameters(), 20.0)
    optimizer.step()


def same(a, b):
    """Whether two pieces of state are bitwise equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b)
    return a == b


def assert_same(ours, theirs):
    (model, optimizer), (plain, reference) = ours, theirs
    for i, (a, b) in enumerate(zip(model.all, plain.all, strict=True)):
        assert torch.equal(a, b), i
    assert same(optimizer.state_dict(), reference.state_dict())


MISSING = ((), (), (2, 3), (2, 3), (), (0, 4, 8), ())
"""For each step; after the third, some parameters have taken fewer steps than others."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit", "Lion8bit", "Adagrad32bit"])
def test_steps_are_those_over_each_parameter(name, dtype):
    model, plain = Model(dtype=dtype), Model(dtype=dtype)
    optimizer, reference = make(name, model, flat=True), make(name, plain, flat=False)
    assert len(list(optimizer._all())) < len(SHAPES)
    for number, missing in enumerate(MISSING):
        step(model, optimizer, number, missing)
        step(plain, reference, number, missing)
        assert_same((model, optimizer), (plain, reference))


@pytest.mark.parametrize("name", LIBRARY)
def test_of_all_optimizers_of_the_library_the_elementwise_are_known(name):
    """Optimizers that step flat are verified; LAMB, which is not elementwise, would fail."""
    try:
        optimizer = make(name, Model(), flat=False)
    except ConfigError as error:
        assert "without momentum" in str(error)  # SGD and LARS need a setting that does not exist
        return
    fault = fault_in_flat_steps(optimizer)
    assert bool(fault) is not steps_by_element(optimizer), fault
    if name == "LAMB":
        assert fault == "its parameters differed on this device"


def test_step_that_depends_on_a_tensor_size_is_detected():
    class Wrong(bnb.optim.AdamW8bit):
        def update_step(self, group, p, gindex, pindex):
            super().update_step(group, p, gindex, pindex)
            self.state[p]["state1"][-1:] = 3  # the content of the end of a buffer

    model = Model()
    assert fault_in_flat_steps(bnb.optim.AdamW8bit(list(model.parameters()))) == ""
    assert "differed" in fault_in_flat_steps(Wrong(list(model.parameters())))


def test_without_launches_nothing_is_moved():
    model = Model()
    assert not wants_flat_steps(make("AdamW8bit", model, flat=False))  # on a CPU
    on_meta = Model().to("meta")  # like any device other than a CPU
    assert wants_flat_steps(make("AdamW8bit", on_meta, flat=False))
    assert not wants_flat_steps(make("LAMB8bit", on_meta, flat=False))
    torch_own = torch.optim.AdamW(on_meta.parameters(), foreach=True)
    assert not wants_flat_steps(torch_own)


@pytest.mark.parametrize("fault", ["its parameters differed on this device", ""])
def test_run_continues_without_components_that_fail_their_check(monkeypatch, fault):
    chosen = Settings(pretrained_model_name_or_path="m", data_path="d")
    strategy = replicated.Strategy(chosen, SimpleNamespace(gather=list))
    monkeypatch.setattr(flat_check, "wants_flat_steps", lambda optimizer: True)
    monkeypatch.setattr(flat_check, "fault_in_flat_steps", lambda optimizer: fault)
    made = strategy.prepare(Model(), lambda model: make("AdamW8bit", model, flat=False))
    assert isinstance(made, bnb.optim.AdamW8bit if fault else FlatOptimizer)
    name = "AdamW8bit steps over one parameter at a time"
    assert strategy.notes == ([f"{name}: over flat buffers {fault}."] if fault else [])


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit"])
@pytest.mark.parametrize("before", [True, False], ids=["flat", "plain"])
@pytest.mark.parametrize("after", [True, False], ids=["to_flat", "to_plain"])
def test_resumed_run_equals_the_uninterrupted_run(tmp_path, name, before, after):
    straight, reference = (model := Model()), make(name, model, flat=True)
    for number, missing in enumerate(MISSING):
        step(straight, reference, number, missing)
    for stop in (2, 4):  # with the original buffers, and with split ones
        model = Model()
        optimizer = make(name, model, flat=before)
        for number, missing in enumerate(MISSING[:stop]):
            step(model, optimizer, number, missing)
        save_state(tmp_path, step=stop, optimizer=optimizer.state_dict(), identity={})
        resumed = Model()
        resumed.load_state_dict(model.state_dict())
        optimizer = make(name, resumed, flat=after)
        load = partial(load_optimizer, optimizer)
        assert load_state(tmp_path, load_optimizer=load, identity={}) == (stop, [])
        for number, missing in list(enumerate(MISSING))[stop:]:
            step(resumed, optimizer, number, missing)
        assert_same((resumed, optimizer), (straight, reference))


def test_state_of_other_parameters_is_refused():
    state = make("AdamW8bit", other := Model(SHAPES[:3]), flat=True)
    step(other, state, 0)
    with pytest.raises(ValueError, match="other parameters"):
        make("AdamW8bit", Model(), flat=True).load_state_dict(state.state_dict())
    turned = make("AdamW8bit", Model([shape[::-1] for shape in SHAPES[:3]]), flat=True)
    with pytest.raises(ValueError, match=r"\(30, 50\).*\(50, 30\)"):
        turned.load_state_dict(state.state_dict())


def test_values_that_something_else_sets_are_stepped_on():
    model, plain = Model(), Model()
    optimizer = make("AdamW8bit", model, flat=True)
    reference = make("AdamW8bit", plain, flat=False)
    for number in range(3):
        for one in (model, plain):
            one.all[1].data = one.all[1].data * 0.5
        step(model, optimizer, number)
        step(plain, reference, number)
        assert_same((model, optimizer), (plain, reference))
    segment = next(s for s in optimizer._all() if any(p is model.all[1] for p in s.parameters))
    model.all[1].data = model.all[1].data.double()
    with pytest.raises(TrainingError, match="float64"):
        segment.attach()


def test_what_shares_its_memory_stays_where_it_is():
    """Two parameters with one tensor, part of a tensor, a custom class: none is moved."""

    class Own(nn.Parameter):
        pass

    table = torch.ones(60, 50)
    shared = [nn.Parameter(table), nn.Parameter(table), nn.Parameter(torch.ones(90, 50)[:60])]
    parameters = [*shared, Own(torch.ones(60, 50)), *(nn.Parameter(table + i) for i in (1, 2))]
    where = [p.data_ptr() for p in parameters]
    optimizer = FlatOptimizer(bnb.optim.AdamW32bit(parameters))
    stays = [p.data_ptr() == place for p, place in zip(parameters, where, strict=True)]
    assert stays == [True, True, True, True, False, False]
    assert [len(s.parameters) for s in optimizer.segments[0]] == [1, 1, 1, 1, 2]


def sum_over_processes():
    """The results of two processes, with and without flat buffers."""
    from xtuner.parallel.processes import Processes

    processes = Processes("cpu")
    found = [steps_of_processes(processes, flat) for flat in (True, False)]
    processes.close()
    return found


def steps_of_processes(processes, flat):
    """Parameters after two steps in which each process has gradients that others lack."""
    model = Model(SHAPES[:4])
    optimizer = make("AdamW8bit", model, flat=flat)
    for number in range(2):
        optimizer.zero_grad(set_to_none=True)
        for i, parameter in enumerate(model.all):
            if i != 2 and (i % 2 == processes.rank or number):
                parameter.grad = numbers(number * 10 + i + processes.rank, parameter.shape)
        gather = optimizer.gather if flat else None
        processes.sum_gradients(model.parameters(), gather=gather)
        clip_gradients(model.parameters(), 20.0)
        optimizer.step()
    values = [p.double().flatten().tolist() for p in model.all]
    states = sorted(optimizer.state_dict()["state"])
    return values, states


@pytest.mark.distributed
def test_gradients_are_summed_in_the_buffers():
    (flat, plain), (elsewhere, _) = run_distributed(sum_over_processes)
    assert flat == plain == elsewhere
    assert flat[1] == [0, 1, 3]  # the third has no gradient anywhere and is not stepped


ON_PAPER = """
import io, json
from xtuner.testing.fake_cuda import device as fake_cuda
card = fake_cuda.install(2**30)
import bitsandbytes as bnb, torch
from torch import nn
from xtuner.engine.optimizer.flat_check import fault_in_flat_steps, wants_flat_steps
from xtuner.engine.optimizer.flat import FlatOptimizer
from xtuner.engine.optimizer.optim import load_optimizer

def made():
    values = (torch.sin(torch.arange(40000.) + i).view(200, 200) for i in range(12))
    return [nn.Parameter(value.cuda()) for value in values]

def steps(optimizer, parameters, first):
    for step in (first, first + 1):
        for i, p in enumerate(parameters):
            p.grad = torch.cos(torch.arange(40000.) * step + i).view(200, 200).cuda()
        waits = card.syncs
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return card.syncs - waits

report = {}
for kind in (bnb.optim.PagedAdamW8bit, bnb.optim.AdamW32bit):
    parameters, flat = made(), made()
    plain = kind(parameters)
    assert wants_flat_steps(plain) and fault_in_flat_steps(plain) == ""
    held = card.allocated
    card.reset_peak()
    optimizer = FlatOptimizer(kind(flat))
    move = card.peak - held, card.allocated - held
    waits = [steps(plain, parameters, 1), steps(optimizer, flat, 1)]
    again = made()
    for p, value in zip(again, flat):
        p.data.copy_(value.data)
    resumed = FlatOptimizer(kind(again))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    size = file.tell()
    file.seek(0)
    load_optimizer(resumed, torch.load(file, map_location="cpu", weights_only=True))
    paged = [getattr(s["state1"], "is_paged", False) for s in resumed.inner.state.values()]
    for o, p in ((plain, parameters), (optimizer, flat), (resumed, again)):
        steps(o, p, 3)
    equal = all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(parameters, flat, again))
    # A part without gradients: state is cut, and what was paged stays so.
    for i, p in enumerate(flat):
        p.grad = None if i < 4 else torch.ones_like(p)
    optimizer.step()
    cut = [getattr(s["state1"], "is_paged", False) for s in optimizer.inner.state.values()]
    found = {"size": size, "waits": waits, "paged": paged, "cut": cut, "equal": equal, "move": move}
    report[kind.__name__] = found
print(json.dumps(report))
"""


@pytest.mark.skipif(device.find_compiler() is None, reason="the card has to be compiled")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch knows real ones")
def test_on_the_fake_cuda_device_it_waits_once_per_buffer():
    done = subprocess.run(
        [sys.executable, "-c", ON_PAPER], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    for name, found in report.items():
        paged = name.startswith("Paged")
        numbers = 12 * 200 * 200
        assert found["size"] <= 1.1 * numbers * 2 * (1 if "8bit" in name else 4)  # nothing twice
        assert found["waits"] == [12 + paged, 1 + paged]
        assert found["equal"], name
        assert found["paged"] == [paged] and found["cut"] == [paged, paged]
        most, held = found["move"]  # first in addition to parameters of 1.9 MB
        assert most <= numbers * 4 * 1.05 and held <= 12 * 256 * 4
