"""Files of a checkpoint with values of any kind end in a message, never in a traceback."""

import contextlib
import copy
import json
import random
import shutil

import pytest
import yaml
from checkpoint_maker import write_adapter

from xtuner.chat.opening import open_chat
from xtuner.convert.merge import merge
from xtuner.convert.to_hf import to_hf
from xtuner.errors import ModelError, XTunerError
from xtuner.generation.generate import GenerationOptions

WILD = (
    None, -1, 0, 2**70, 1e308, float("nan"), "", "x", "../x", [], {}, [[]], {"a": {}}, True, [None],
    "0" * 5000, -3.5, "\ud800",
)  # fmt: skip
COUNT = 12


def paths(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from paths(inner, (*path, key))


def mutated(values, rng):
    """`values` with one to three entries replaced or removed."""
    values = copy.deepcopy(values)
    for _ in range(rng.choice([1, 1, 2, 3])):
        *outer, last = rng.choice(list(paths(values)))
        table = values
        for key in outer:
            table = table[key]
        if rng.random() < 0.2:
            del table[last]
        else:
            table[last] = rng.choice(WILD)
    return values


def variants(text, load, dump, *, seed):
    rng = random.Random(seed)
    for number in range(COUNT):
        if number % 4 == 3:
            yield text[: rng.randrange(len(text))]
        else:
            yield dump(mutated(load(text), rng))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["adapter_config.json", "run.yaml", "config.json"])
def test_wild_values_are_named(name, tmp_path, tiny_model_path):
    base = shutil.copytree(tiny_model_path, tmp_path / "base")
    adapter = write_adapter(tmp_path / "iter_7", base)
    few = GenerationOptions(max_new_tokens=2)
    file = (base if name == "config.json" else adapter) / name
    text = file.read_text(encoding="utf-8")
    load, dump = (yaml.safe_load, yaml.safe_dump) if "yaml" in name else (json.loads, json.dumps)
    outcomes = []
    for number, content in enumerate(variants(text, load, dump, seed=name)):
        file.write_text(content, encoding="utf-8")
        tries = {
            "chat": lambda: open_chat(adapter, options=few).ask("Hi"),
            "merge": lambda n=number: merge(base, adapter, tmp_path / f"m{n}", log=str),
            "to_hf": lambda n=number: to_hf(adapter, tmp_path / f"h{n}", log=str),
        }
        for attempt in tries.values():
            named = True
            with contextlib.suppress(XTunerError):
                attempt()
                named = False
            outcomes.append(named)
    assert any(outcomes)


@pytest.mark.parametrize(
    ("name", "value"), [("num_key_value_heads", 0), ("hidden_act", "x"), ("vocab_size", 2**70)]
)
def test_merging_an_adapter_of_4_bit_weights_names_a_wrong_config(
    name, value, tmp_path, tiny_model_path
):
    base = shutil.copytree(tiny_model_path, tmp_path / "base")
    adapter = write_adapter(tmp_path / "iter_7", base, settings={"tuning": "qlora"})
    config = json.loads((base / "config.json").read_text()) | {name: value}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot load the model"):
        merge(base, adapter, tmp_path / "out", log=str)
