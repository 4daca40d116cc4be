"""YAML files of LLaMA-Factory and torchtune, translated to our settings."""

import json

import pytest

from xtuner.errors import ConfigError
from xtuner.migrate import file

FACTORY = """
model_name_or_path: some/model
quantization_bit: 4
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj, v_proj
dataset: mine
dataset_dir: data
template: qwen
cutoff_len: 1024
max_samples: 100
output_dir: saves/run
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_steps: 20
bf16: true
save_steps: 50
report_to: none
"""
TUNE = """
output_dir: /tmp/out
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: ['q_proj', 'output_proj']
  apply_lora_to_mlp: True
  lora_rank: 16
  lora_alpha: 32
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /m/tokenizer.model
  max_seq_len: 2048
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: ${output_dir}/model
  checkpoint_files: [model.safetensors]
  model_type: LLAMA3_2
dataset:
  _component_: torchtune.datasets.chat_dataset
  source: json
  data_files: rows.json
  conversation_column: messages
  conversation_style: openai
  packed: True
seed: 3
shuffle: True
batch_size: 4
optimizer:
  _component_: torch.optim.AdamW
  fused: True
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
epochs: 1
max_steps_per_epoch: null
gradient_accumulation_steps: 8
clip_grad_norm: null
compile: False
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}/logs
log_every_n_steps: 1
device: cuda
dtype: bf16
enable_activation_checkpointing: True
"""
INFO = {
    "mine": {
        "file_name": "mine.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    },
    "far": {"hf_hub_url": "owner/set"},
    "other": {"file_name": "other.json"},
    "pairs": {"file_name": "p.json", "ranking": True},
    "odd": {"file_name": "o.json", "columns": {"prompt": "ask", "response": "reply"}},
}


@pytest.fixture
def draft(tmp_path, monkeypatch):
    def draft(text, **replace):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
        for key, value in replace.items():
            lines = [line for line in text.split("\n") if not line.startswith(f"{key}:")]
            text = "\n".join([*lines, f"{key}: {value}"])
        path = tmp_path / "old.yaml"
        path.write_text(text, encoding="utf-8")
        return file.read(path)

    return draft


def expect(found, expected):
    assert not found.refused, [str(item) for item in found.refused]
    assert {name: found.values.get(name) for name in expected} == expected


def test_llamafactory_qlora(draft):
    found = draft(FACTORY)
    assert (found.outcome, found.kind, found.lost) == ("migrated", "sft qlora", [])
    expected = {
        "pretrained_model_name_or_path": "some/model",
        "quantization": "nf4",
        "double_quant": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "v_proj"],
        "data_path": ["data/mine.json"],
        "dataset_format": ["openai"],
        "max_dataset_length": 100,
        "prompt_template": "auto",
        "max_length": 1024,
        "pack_to_max_length": False,
        "batch_size": 2,
        "accumulative_counts": 8,
        "lr": 1e-4,
        "max_norm": 1.0,
        "max_epochs": 3,
        "warmup_steps": 20,
        "save_steps": 50,
        "dtype": "bfloat16",
        "work_dir": "saves/run",
    }
    expect(found, expected)
    assert "steps_are" not in found.values


def test_llamafactory_full_and_pretraining(draft):
    full = draft(FACTORY.replace("quantization_bit: 4\n", ""), finetuning_type="full")
    expect(full, {"tuning": "full"})
    assert "lora_r" not in full.values
    pretraining = draft(FACTORY, stage="pt")
    expected = {"algorithm": "pretrain", "overlong": "truncate", "pack_to_max_length": True}
    expect(pretraining, expected)


@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        ({"finetuning_type": "freeze"}, "neither lora nor full"),
        ({"use_galore": "true"}, "use_galore"),
        ({"dataset": "nobody"}, "is not in dataset_info.json"),
        ({"dataset": "odd"}, "rename them"),
        ({"dataset": "mine,far"}, "limits each of 2"),
        ({"dataset_dir": "elsewhere"}, "defined in dataset_info.json"),
        ({"optim": "lomo"}, "optim: lomo"),
        ({"lr_scheduler_type": "polynomial"}, "polynomial"),
        ({"num_train_epochs": "1.5"}, "use an integer"),
        ({"quantization_bit": "3"}, "4 or 8"),
        ({"template": "default"}, "not the template of a chat model"),
        ({"learning_rate": "[1]"}, "does not accept"),
        ({"do_train": "false"}, "nothing is trained"),
        ({"stage": "mine"}, "neither sft nor pt"),
    ],
    ids=range(14),
)
def test_llamafactory_is_refused_where_the_meaning_would_change(draft, replace, reason):
    found = draft(FACTORY, **replace)
    assert found.outcome == "refused"
    assert reason in " | ".join(map(str, found.refused))


@pytest.mark.parametrize(
    ("replace", "settings"),
    [
        ({"use_rslora": "true", "use_dora": "true"},
         {"lora_config": {"use_rslora": True, "use_dora": True}}),
        ({"pissa_init": "true"}, {"lora_config": {"init_lora_weights": "pissa"}}),
        ({"pissa_init": "true", "pissa_iter": "-1"},
         {"lora_config": {"init_lora_weights": "pissa"}}),
        ({"loraplus_lr_ratio": "16.0"}, {"loraplus_lr_ratio": 16.0}),
        ({"neftune_noise_alpha": "5"}, {"neftune_noise_alpha": 5.0}),
        ({"use_muon": "true"}, {"optim_type": "Muon"}),
        ({"resize_vocab": "true"}, {"resize_embeddings": True}),
        ({"disable_shuffling": "true"}, {"shuffle": False}),
        ({"save_strategy": "epoch"}, {"save_epochs": 1}),
        ({"report_to": "wandb"}, {"report_to": ["wandb"]}),
        ({"val_size": "0.1", "load_best_model_at_end": "true"}, {"keep_best": True}),
        ({"optim": "adafactor"}, {"optim_type": "Adafactor"}),
    ],
    ids=range(12),
)  # fmt: skip
def test_llamafactory_methods_become_settings(draft, replace, settings):
    found = draft(FACTORY, **replace)
    assert (found.outcome, found.lost) == ("migrated", [])
    expect(found, settings)
    if "neftune_noise_alpha" in replace:
        full = draft(FACTORY.replace("quantization_bit: 4\n", ""), finetuning_type="full",
                     use_dora="true")  # fmt: skip
        assert "lora_config" not in full.values


@pytest.mark.parametrize("stage", ["dpo", "kto", "rm", "ppo"])
def test_llamafactory_preferences_are_not_yet(draft, stage):
    assert draft(FACTORY, stage=stage).outcome == "not yet"
    assert draft(FACTORY, dataset="pairs").outcome == "not yet"


def test_llamafactory_limits_each_data_set(draft, tmp_path):
    draft(FACTORY)
    (tmp_path / "data" / "mine.json").write_text(json.dumps([{}] * 400))
    (tmp_path / "data" / "other.json").write_text(json.dumps([{}] * 80))
    found = draft(FACTORY, dataset="mine,other")
    expected = {
        "data_path": ["data/mine.json", "data/other.json"],
        "dataset_format": ["openai", "alpaca"],
        "data_repeats": [0.25, 1.0],
        "max_dataset_length": None,
    }
    expect(found, expected)
    assert "data_repeats" not in draft(FACTORY, dataset="mine,other", max_samples="500").values


def test_llamafactory_unknown_keys_are_lost_with_their_line(draft):
    found = draft(FACTORY, deepspeed="ds.json", my_key="5")
    assert found.outcome == "with losses"
    assert [(item.line, item.what) for item in found.lost] == [
        (25, "deepspeed = 'ds.json'"),
        (26, "my_key = 5"),
    ]


def test_torchtune_lora(draft):
    found = draft(TUNE)
    assert (found.outcome, found.kind, found.lost) == ("migrated", "sft lora", [])
    expected = {
        "pretrained_model_name_or_path": "/tmp/out/model",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "data_path": ["rows.json"],
        "dataset_format": ["openai"],
        "prompt_template": "auto",
        "max_length": 2048,
        "pack_to_max_length": True,
        "batch_size": 4,
        "accumulative_counts": 8,
        "max_epochs": 1,
        "lr": 3e-4,
        "weight_decay": 0.01,
        "max_norm": None,
        "warmup_steps": 100,
        "seed": 3,
        "dtype": "bfloat16",
        "work_dir": "/tmp/out",
    }
    expect(found, expected)


def test_torchtune_qlora_full_and_what_is_learnt(draft):
    qlora = draft(TUNE.replace("lora_llama3", "qlora_llama3"))
    expect(qlora, {"tuning": "qlora"})
    text = TUNE.replace("chat_dataset", "alpaca_cleaned_dataset").replace("max_seq_len: 2048", "")
    for line in ("source: json", "data_files: rows.json", "conversation_column: messages",
                 "conversation_style: openai", "packed: True"):  # fmt: skip
        text = text.replace(f"  {line}\n", "")
    learnt = draft(text)
    expected = {
        "data_path": ["yahma/alpaca-cleaned"],
        "dataset_format": ["alpaca_prompted"],
        "algorithm": "pretrain",
        "overlong": "error",
    }
    expect(learnt, expected)


@pytest.mark.parametrize(
    ("old", "new", "outcome"),
    [
        ("loss.CEWithChunkedOutputLoss", "loss.DPOLoss", "not yet"),
        ("epochs: 1\n", "epochs: 1\nteacher_model:\n  _component_: x.y\n", "not yet"),
        ("FullModelHFCheckpointer", "FullModelMetaCheckpointer", "refused"),
        ("lora_rank: 16", "use_dora: True", "migrated"),
        ("torch.optim.AdamW", "torchao.optim.AdamW4bit", "refused"),
        ("loss.CEWithChunkedOutputLoss", "loss.MyLoss", "refused"),
        ("llama3_2.lora_llama3_2_1b", "phi3.lora_phi3_mini", "refused"),
        ("conversation_style: openai", "conversation_style: other", "refused"),
        ("epochs: 1\n", "epochs: 2\n", "with losses"),
        ("compile: False", "my_key: 5", "with losses"),
    ],
    ids=range(10),
)
def test_torchtune_outcomes(draft, old, new, outcome):
    assert old in TUNE
    assert draft(TUNE.replace(old, new)).outcome == outcome


@pytest.mark.parametrize(
    "text",
    [
        "stage: sft\ncutoff_len: [1, 2",
        "stage: sft\ncutoff_len: &a [*a]\n",
        "stage: 2001-99-99\ncutoff_len: 0x\ndo_train: !!python/object:os.system x\n",
        "stage: sft\ncutoff_len: " + "[" * 1500,
    ],
    ids=["open", "itself", "values", "deep"],
)
def test_hostile_yaml_file_raises_a_config_error(draft, text):
    try:
        found = draft(text)
    except ConfigError:
        return
    assert found.outcome == "refused"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "a.yml",
            "base_model: m\nmicro_batch_size: 2\nsequence_len: 9\n",
            "`xtuner train .*a.yml`",
        ),
        ("t.py", "from trl import SFTTrainer\nimport peft\n", r"a script \(it imports peft, trl\)"),
        ("s.yaml", "lr: 1.0e-4\n", "needs no migration"),
    ],
    ids=["Axolotl", "TRL script", "own"],
)
def test_what_is_not_converted_is_named_with_what_to_do(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        file.migrate(tmp_path / name)
