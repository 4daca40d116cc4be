"""Every causal architecture of transformers: trained packed, one sample at a time, or refused.

What trains gives transformers' own loss and gradients. docs/architectures.md has the table;
``python tests/models/test_every_architecture.py [MODEL_TYPE ...]`` regenerates it, or those rows.
"""

import itertools
import re
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from xtuner.config.load import load_settings
from xtuner.errors import ModelError, XTunerError
from xtuner.models.can_pack import resolve_packing
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.prepare import make_trainable
from xtuner.testing.architectures import tiny_config
from xtuner.testing.tiny import tiny_tokenizer
from xtuner.types import IGNORE_INDEX, Batch

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
PACKED, APART, REFUSED, UNTRIED = "packed", "one at a time", "refused", "not tried"
LENGTHS = (7, 12, 9)
SECONDS = 240


def outcome(kind):
    """(what, why) of one architecture."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
            assert sum(p.numel() for p in model.parameters()) < 6e7, "is too large when tiny"
            model.save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            expected = by_transformers(folder)
        except Exception as error:  # sizes that do not fit, or missing packages
            missing = isinstance(error, ImportError) or "library but it was not found" in str(error)
            refused = None if missing else refused_by_both(folder, kind)
            return refused or (UNTRIED, " ".join(str(error).split())[:90])
        try:
            made = [trained(folder, tuning) for tuning in ("full", "lora")]
        except XTunerError as error:
            return REFUSED, reason(str(error))
        for tuning, (loss, gradients, _, _) in zip(("full", "lora"), made, strict=True):
            assert abs(loss - expected[0]) < 1e-4 * expected[0], (kind, tuning, loss, expected[0])
            if tuning == "full":
                compare(kind, gradients, expected[1])
        apart, why = made[1][2:]
        return (APART, why) if apart else (PACKED, "")


def refused_by_both(folder, kind):
    """What xtuner says of a model that transformers cannot load or run as a causal one; None if
    there is no configuration, or xtuner takes it."""
    try:
        if not (folder / "config.json").is_file():
            AutoConfig.for_model(kind).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        trained(folder, "lora")
    except XTunerError as error:
        return REFUSED, reason(str(error))
    except Exception:  # the default configuration is not valid
        return None
    return None


def by_transformers(folder):
    """Loss and gradients of transformers, one sample at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    total = 0.0
    for part in batch().split():
        logits = model(input_ids=part.input_ids, use_cache=False).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, part.input_ids[0, 1:], reduction="sum")
    total.backward()
    return float(total), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def trained(folder, tuning):
    """Loss, gradients, whether samples went one at a time, and why, as a run would have them."""
    settings = load_settings(
        {
            "pretrained_model_name_or_path": str(folder), "data_path": "rows.jsonl",
            "tuning": tuning, "lora_r": 4, "max_length": 64, "dtype": "float32",
        }
    ).settings  # fmt: skip
    settings, line = resolve_packing(settings)
    model = make_trainable(settings, dtype=torch.float32, device="cpu", recompute=False)
    lm = PackedCausalLM(model)
    note = lm.verify(packed=False) or ""
    loss = -lm.train()(batch()).sum()
    loss.backward()
    found = {n.removeprefix("model."): p.grad for n, p in lm.named_parameters()}
    return float(loss), found, lm.apart, reason(line or note)


def compare(kind, found, expected):
    for name, gradient in expected.items():
        if gradient.norm() > 1e-6:
            assert found[name] is not None, (kind, name)
            assert (found[name] - gradient).norm() < 1e-3 * gradient.norm(), (kind, name)


def batch():
    count = sum(LENGTHS)
    ids = torch.randint(5, 200, (1, count), generator=torch.Generator().manual_seed(0))
    ends = [0, *itertools.accumulate(LENGTHS)]
    labels = ids.clone()
    labels[0, ends[:-1]] = IGNORE_INDEX
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return Batch(ids, labels, positions, torch.tensor(ends, dtype=torch.int32))


def reason(text):
    """The reason, without the model's name and numbers that depend on the machine."""
    alone = "takes one sample at a time, (?:for|because) "
    text = re.sub(rf"^not packed: \w+ {alone}", "", text.split("; ")[0])
    text = re.sub(r"^pretrained_model_name_or_path: \S+ \(\w+\) is ", "it is ", text)
    built = "transformers cannot build it as a language model: "
    text = re.sub(r"cannot load the model '.+?' \(.+?\): ", built, text).split(" Hint")[0]
    text = re.sub(r"^\w+ with attention '\w+': ", "", text)
    text = re.sub(r"(samples go|the model takes) .{0,25}one (sample )?at a time: ", "", text)
    text = re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", text)
    return " ".join(text.split()).split(". ")[0].removesuffix(".")[:150]


def rows():
    """The rows of the table: {model type: (what, why)}."""
    found = re.findall(r"^\| `(.+?)` \| (.+?) \| (.*?) \|$", TABLE.read_text(), re.MULTILINE)
    return {kind: (what, why) for kind, what, why in found}


def in_time(kind):
    def stop(*_):
        raise ModelError("took too long")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return outcome(kind)
    finally:
        signal.alarm(0)


def test_the_table_has_every_architecture():
    assert set(rows()) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_architecture_does_what_the_table_says(kind):
    what, _ = rows()[kind]
    if what == UNTRIED:
        pytest.skip(rows()[kind][1])
    assert in_time(kind)[0] == what


def write_table(kinds):
    """Write the table, with new rows for `kinds`."""
    found = rows()
    for kind in kinds:
        try:
            what, why = in_time(kind)
        except (AssertionError, ModelError) as error:
            what, why = "FAULT", " ".join(str(error).split())[:150]
        found[kind] = what, why.replace("|", "/")
        print(kind, *found[kind], flush=True)
    lines = [f"| `{kind}` | {what} | {why} |" for kind, (what, why) in sorted(found.items())]
    count = {what: sum(f" | {what} | " in line for line in lines)
             for what in (PACKED, APART, REFUSED, UNTRIED)}  # fmt: skip
    import transformers

    TABLE.write_text(
        f"""# Architectures

Every causal architecture of transformers {transformers.__version__}, tiny and with random weights,
trained in full and with LoRA on the CPU. What trains gives transformers' own loss and gradients.
"packed" means that several samples share a row, isolated from each other; "one at a time" that
each sample goes through the model by itself, because it needs to.

{count[PACKED]} are trained packed, {count[APART]} one sample at a time, {count[REFUSED]} are
refused, and {count[UNTRIED]} were not tried: no tiny model of them could be made here.
`python tests/models/test_every_architecture.py` writes this page; `make test-slow` checks it.

| model type | trained | why |
|---|---|---|
"""
        + "\n".join(lines)
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    sys.path.insert(0, "src")
    write_table(sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
