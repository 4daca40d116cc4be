"""Optimizers, and complete runs of `xtuner train`, on a GPU."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from xtuner.cli.app import main
from xtuner.config.schema import Settings
from xtuner.engine.optimizer import optim
from xtuner.testing.tiny import tiny_model_folder

pytestmark = pytest.mark.gpu

OPTIMIZERS = ["AdamW", "SGD", "AdamW8bit", "PagedAdamW32bit", "PagedAdamW8bit"]
TEXT = """
pretrained_model_name_or_path = "model"
data_path = "rows.json"
prompt_template = "chatml"
device = "cuda"
max_length = 192
pack_to_max_length = True
batch_size = 1
accumulative_counts = 2
max_epochs = 9
max_steps = 6
save_steps = 3
logging_steps = 1
lr = 1e-3
lr_schedule = "constant"
warmup_ratio = 0
tuning = "lora"
lora_r = 8
"""


def values(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(name, device, steps):
    """Weights of a matrix and a bias after steps with fixed gradients; matrices of 100,000 numbers
    are paged."""
    layer = nn.Linear(400, 300)
    with torch.no_grad():
        layer.weight.copy_(values((300, 400), 1))
        layer.bias.copy_(values((300,), 2))
    layer = layer.to(device)
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = optim.make_optimizer(
        name, layer, paged=torch.device(device).type == "cuda", **options
    )
    for step in steps:
        for seed, parameter in enumerate(layer.parameters()):
            grad = values(parameter.shape, 100 * step + seed)
            parameter.grad = grad.to(parameter.device)
        optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_a_cpu(card, name):
    found, _ = trained(name, card, range(4))
    wanted, _ = trained("SGD" if name == "SGD" else "AdamW", "cpu", range(4))
    # of 8-bit state every step is off by some percent of lr; bitsandbytes adds epsilon to a moment
    # that is not corrected yet, which moves gradients near 0 by 0.4 % of lr (H200)
    allowed = 4e-2 * 0.3 if "8bit" in name else 1e-4 if "32bit" in name else 1e-5
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        assert (a.detach().cpu() - b.detach()).abs().max() <= allowed


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_survives_a_file(card, tmp_path, name):
    straight, _ = trained(name, card, range(6))
    layer, optimizer = trained(name, card, range(3))
    torch.save({"optimizer": optimizer.state_dict(), "weights": layer.state_dict()},
               tmp_path / "state.pt")  # fmt: skip
    kept = torch.load(tmp_path / "state.pt", weights_only=False, map_location="cpu")
    fresh, again = trained(name, card, [])
    fresh.load_state_dict(kept["weights"])
    optim.load_optimizer(again, kept["optimizer"])
    for step in range(3, 6):
        for seed, parameter in enumerate(fresh.parameters()):
            parameter.grad = values(parameter.shape, 100 * step + seed).to(card)
        again.step()
    for a, b in zip(fresh.parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    tiny_model_folder("model", **sizes, **heads, initializer_range=0.1)
    rows = [
        {"instruction": f"What comes after {n}?", "input": "", "output": f"{n + 1} it is." * 3}
        for n in range(40)
    ]
    Path("rows.json").write_text(json.dumps(rows))
    return tmp_path


def train(name, text, *arguments):
    Path(f"{name}.py").write_text(TEXT + text)
    code = main(["train", f"{name}.py", "--work-dir", name, *arguments])
    files = sorted(Path(name).glob("*/scalars.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return code, [line["loss"] for line in lines if "loss" in line]


RUNS = {
    "lora": "",
    "qlora": 'tuning = "qlora"\ngradient_checkpointing = True\noptim_type = "PagedAdamW8bit"\n',
    "full": 'tuning = "full"\n',
    "embedding": 'tuning = "qlora"\nembedding_on_cpu = True\n',
}


@pytest.mark.parametrize("name", RUNS)
def test_it_learns_as_on_a_cpu(workshop, name):
    code, found = train(name, RUNS[name])
    assert code == 0 and len(found) == 6
    code, wanted = train(f"cpu_{name}", RUNS[name] + 'device = "cpu"\ndtype = "float32"\n')
    assert code == 0
    assert found == pytest.approx(wanted, rel=0.02)
    assert found[-1] < 0.97 * found[0]  # guards the comparison


def test_float16(workshop):
    try:
        Settings(pretrained_model_name_or_path="model", data_path="rows.json", dtype="float16")
    except ValidationError:
        pytest.skip("training in float16 is refused by this version")
    code, found = train("half", 'dtype = "float16"\n')
    assert code == 0
    _, wanted = train("wide", 'device = "cpu"\ndtype = "float32"\n')
    assert found == pytest.approx(wanted, rel=0.02)


def test_out_of_memory_message_says_what_to_change(workshop, limited, capsys):
    rows = [{"instruction": "Go on.", "input": "", "output": "on and on " * 200}] * 40
    Path("rows.json").write_text(json.dumps(rows))
    text = 'tuning = "full"\nmax_length = 4096\nbatch_size = 4\naccumulative_counts = 1\n'
    text += "gradient_checkpointing = False\n"
    limited(160 * 2**20)  # room for the model, but not for the step
    code, losses = train("tight", text)
    said = "".join(capsys.readouterr())
    assert code == 2 and not losses
    assert "Cheapest changes" in said and "Traceback" not in said
