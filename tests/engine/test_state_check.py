"""Invalid optimizer state is reported; valid state is accepted."""

import pytest
import torch
from torch import nn

from xtuner.config.schema import Settings
from xtuner.engine.optimizer.optim import make_optimizer
from xtuner.engine.optimizer.state_check import check_state
from xtuner.engine.strategies.replicated import Strategy
from xtuner.engine.training_state import load_state, save_state
from xtuner.errors import CheckpointError
from xtuner.models.run_info import RunInfo
from xtuner.parallel.processes import Processes


def stepped(name="AdamW"):
    """An optimizer of a small model after one step."""
    model = nn.Linear(64, 96)
    made = make_optimizer(name, model, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    model(torch.randn(3, 64)).sum().backward()
    made.step()
    return made


def resume(folder):
    """Load the state in `folder` as a run does."""
    settings = Settings(pretrained_model_name_or_path="m", data_path="d")
    strategy = Strategy(settings, Processes("cpu"))
    strategy.optimizer = stepped()
    load_state(folder, load_optimizer=strategy.load_optimizer_state, identity={})


@pytest.mark.parametrize(
    "name",
    ["AdamW", "SGD", "Adafactor", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam",
     "RMSprop", "Rprop", "AdamW8bit", "Lion"],
)  # fmt: skip
def test_valid_optimizer_state_is_accepted(name) -> None:
    check_state(stepped(name), stepped(name).state_dict())


def _cut(state):
    state["exp_avg"] = state["exp_avg"][:1]


def _scalar(state):
    state["exp_avg_sq"] = torch.tensor(1.0)


def _nan(state):
    state["exp_avg"][0, 3] = float("nan")


def _negative(state):
    state["exp_avg_sq"][0, 3] = -1.0


def _step(state):
    state["step"] = "many"


def _early_step(state):
    state["step"] = torch.tensor(-5.0)


def _one_number(state):
    state["exp_avg"] = torch.zeros(1).expand(96, 64)  # 4 bytes; a fused kernel reads 24,576


def _sparse(state):
    state["exp_avg"] = state["exp_avg"].to_sparse()


def _whole_numbers(state):
    state["exp_avg"] = state["exp_avg"].long()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_cut, r"'exp_avg' of parameter 0.*shape \[1, 64\], and the parameter \[96, 64\]"),
        (_scalar, r"shape \[\]"),
        (_nan, "not finite"),
        (_negative, "negative"),
        (_step, "'step'"),
        (_early_step, "'step'.*must be a number of steps"),
        (_one_number, "not contiguous in memory"),
        (_sparse, "not contiguous in memory"),
        (_whole_numbers, "must hold floating-point numbers"),
    ],
    ids=["shape", "scalar", "nan", "negative", "step", "below", "expanded", "sparse", "integers"],
)
def test_impossible_state_is_reported(spoil, words, tmp_path) -> None:
    spoilt = stepped()
    spoil(spoilt.state[spoilt.param_groups[0]["params"][0]])
    save_state(tmp_path, step=3, optimizer=spoilt.state_dict(), identity={})
    with pytest.raises(CheckpointError, match=f"training_state.pt: cannot be resumed.*{words}"):
        resume(tmp_path)


def test_scales_of_eight_bits_must_reach_all_numbers() -> None:
    made = stepped("AdamW8bit")
    state = made.state_dict()
    entries = state["state"][0]
    entries = entries.get("__bnb_optimizer_quant_state__", entries)
    assert entries["state1"].dtype == torch.uint8 or "absmax1" not in entries
    entries["absmax1"] = torch.ones(1)
    with pytest.raises(ValueError, match="absmax1"):
        check_state(made, state)


def test_a_step_that_the_run_file_does_not_know_is_named(tmp_path) -> None:
    save_state(tmp_path, step=10**9, optimizer=stepped().state_dict(), identity={})
    RunInfo("adapter", "m", step=3).write(tmp_path)
    with pytest.raises(CheckpointError, match=r"at step 1000000000, but run\.yaml says 3"):
        resume(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04junk"], ids=["empty", "text", "archive"]
)
def test_a_damaged_file_is_named_as_such(content, tmp_path) -> None:
    (tmp_path / "training_state.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be resumed from: it is damaged \(\w+"):
        resume(tmp_path)


@pytest.mark.parametrize("content", [[], {}, {"optimizer": []}], ids=["list", "empty", "parts"])
def test_another_content_than_a_training_state_is_named(content, tmp_path) -> None:
    torch.save(content, tmp_path / "training_state.pt")
    with pytest.raises(CheckpointError, match="it is not the training state of a run"):
        resume(tmp_path)
