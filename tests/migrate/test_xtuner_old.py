"""Configs of XTuner 0.x, translated to our settings."""

import pytest
from old_configs import LLAVA, SFT

from xtuner.config.load import load_settings
from xtuner.data.formats import resolve
from xtuner.errors import ConfigError
from xtuner.migrate import file
from xtuner.templates import load
from xtuner.testing.tiny import tiny_tokenizer
from xtuner.types import Message


@pytest.fixture
def draft(tmp_path):
    """The draft of a config, with some of its text replaced."""

    def draft(text=SFT, **changes):
        for old, new in changes.pop("replace", {}).items():
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "my_old.py"
        path.write_text(text, encoding="utf-8")
        return file.read(path)

    return draft


def words(items):
    return " | ".join(map(str, items))


def test_a_qlora_config_is_carried_with_nothing_lost(draft):
    found = draft()
    assert (found.outcome, found.lost, found.kind) == ("migrated", [], "sft qlora")
    expected = {
        "pretrained_model_name_or_path": "some/model",
        "tuning": "qlora",
        "quantization": "nf4",
        "double_quant": True,
        "lora_r": 64,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "data_path": ["data/rows.jsonl"],
        "dataset_format": ["openai"],
        "prompt_template": "internlm2_chat",
        "SYSTEM": "",
        "max_length": 512,
        "pack_to_max_length": True,
        "batch_size": 1,
        "accumulative_counts": 16,
        "max_epochs": 2,
        "steps_are": "micro_batches",
        "optim_type": "AdamW",
        "lr": 2e-4,
        "betas": (0.9, 0.999),
        "weight_decay": 0.0,
        "max_norm": 1.0,
        "warmup_ratio": 0.03,
        "lr_schedule": "cosine",
        "evaluation_inputs": ["Who are you?"],
        "evaluation_freq": 300,
        "evaluation_max_new_tokens": 600,
        "save_steps": 300,
        "save_total_limit": 3,
        "logging_steps": 10,
        "work_dir": "./work_dirs/my_old",
    }
    assert {name: found.values.get(name) for name in expected} == expected


def test_what_is_written_loads_to_the_same_settings(draft, tmp_path, monkeypatch):
    found = draft()
    monkeypatch.chdir(tmp_path)
    done = file.migrate(tmp_path / "my_old.py")
    assert done.path.name == "my_old_migrated.py"
    loaded = load_settings(done.path).settings
    for name, value in found.values.items():
        given = getattr(loaded, name)
        assert (list(given) if isinstance(given, tuple) else given) == (
            list(value) if isinstance(value, tuple | list) else value
        )
    assert "line 41, torch.float16" in done.path.read_text(encoding="utf-8")


def test_llava_pretraining(draft):
    found = draft(LLAVA)
    assert (found.outcome, found.kind) == ("migrated", "LLaVA pretraining")
    expected = {
        "visual_encoder_name_or_path": "some/clip",
        "freeze_llm": True,
        "tuning": "full",
        "dtype": "bfloat16",
        "data_path": ["./data/rows.json"],
        "image_folder": "./data/images",
        "dataset_format": ["llava_image_first"],
        "prompt_template": "xtuner0_vicuna",
        "max_length": 1472,
        "pack_to_max_length": False,
        "pad_image_to_square": False,
        "group_by_modality": True,
        "batch_size": 8,
        "warmup_ratio": 0.0,
        "lr_end_ratio": 0.1,
    }
    assert {name: found.values.get(name) for name in expected} == expected


LORA = "    lora=dict(type=LoraConfig, r=64, lora_alpha=16, lora_dropout=0.1, bias='none',\n"


@pytest.mark.parametrize(
    ("replace", "expected"),
    [
        ({"load_in_4bit=True": "load_in_8bit=True"}, {"quantization": "int8", "tuning": "qlora"}),
        ({"bnb_4bit_quant_type='nf4'": "x=None"}, {"quantization": "fp4"}),
        ({"r=64, lora_alpha=16, lora_dropout=0.1, ": ""}, {"lora_r": 8, "lora_alpha": 8}),
        ({"openai_map_fn,\n": "None,\n"}, {"dataset_format": ["xtuner"]}),
        ({"openai_map_fn": "code_alpaca_map_fn"}, {"dataset_format": ["code_alpaca"]}),
        ({"openai_map_fn": "law_reference_map_fn"}, {"dataset_format": ["qa"]}),
        ({"PROMPT_TEMPLATE.internlm2_chat": "PROMPT_TEMPLATE.default"},
         {"prompt_template": "xtuner0_default"}),
        ({"path='json', data_files=dict(train=rows)": "path='owner/set', name='en'"},
         {"data_path": ["owner/set:en"]}),
        ({"randomness = dict(seed=None": "randomness = dict(seed=7"}, {"seed": 7}),
        ({"by_epoch=False, interval=every": "by_epoch=False, interval=-1"},
         {"save_steps": 1_000_000_000}),
        ({"eta_min=0.0": "eta_min=lr * 0.15"}, {"lr_end_ratio": 0.15}),
        ({"clip_grad=dict(max_norm=1, error_if_nonfinite=False),": ""}, {"max_norm": None}),
    ],
    ids=range(12),
)  # fmt: skip
def test_variants(draft, replace, expected):
    found = draft(replace=replace)
    assert not found.refused, words(found.refused)
    assert {name: found.values.get(name) for name in expected} == expected


def test_the_system_message_of_the_sample_answers_is_not_that_of_the_rows(draft):
    found = draft(replace={"SYSTEM = ''": "SYSTEM = SYSTEM_TEMPLATE.alpaca"})
    assert found.values["SYSTEM"] == ""
    assert found.values["evaluation_system"].startswith("Below is an instruction")
    found = draft(replace={"SYSTEM = ''": "SYSTEM = SYSTEM_TEMPLATE.sql", "openai_map": "sql_map"})
    assert "SQL" in found.values["SYSTEM"]
    assert "evaluation_system" not in found.values
    assert "SYSTEM_TEMPLATE.sql" in words(found.notes)


def test_a_named_system_message_is_that_of_the_old_package_around_the_config(draft, tmp_path):
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "templates.py").write_text(
        "SYSTEM_TEMPLATE = ConfigDict(sql=('Write' ' SQL.\\n'), other=boom())\n"
    )
    changes = {"SYSTEM = ''": "SYSTEM = SYSTEM_TEMPLATE.sql", "openai_map": "sql_map"}
    assert "SYSTEM_TEMPLATE.sql" in words(draft(replace=changes).notes)  # boom() is not text
    (tmp_path / "utils" / "templates.py").write_text(
        "SYSTEM_TEMPLATE = ConfigDict(sql=('Write' ' SQL.\\n'))\n"
    )
    found = draft(replace=changes)
    assert found.values["SYSTEM"] == "Write SQL.\n"
    assert "SYSTEM_TEMPLATE" not in words(found.notes)


def test_a_dumped_config_reads_like_its_source(draft):
    dotted = {
        "type=SupervisedFinetune": "type='xtuner.model.SupervisedFinetune'",
        "type=AutoModelForCausalLM.from_pretrained":
            "type='transformers.AutoModelForCausalLM.from_pretrained'",
        "torch_dtype=torch.float16": "torch_dtype='torch.float16'",
        "dataset_map_fn=openai_map_fn": "dataset_map_fn='xtuner.dataset.map_fns.openai_map_fn'",
        "template = PROMPT_TEMPLATE.internlm2_chat":
            "template = 'xtuner.utils.PROMPT_TEMPLATE.internlm2_chat'",
        "type=AdamW": "type='torch.optim.AdamW'",
    }  # fmt: skip
    copies = {
        "type=DatasetInfoHook, tokenizer=tokenizer": "type=DatasetInfoHook, tokenizer=dict(x=1)",
        "type=EvaluateChatHook, tokenizer=tokenizer":
            "type='xtuner.engine.hooks.EvaluateChatHook', tokenizer=dict(x=[dict(y=1)])",
        "    tokenizer=tokenizer,\n    max_length":
            "    tokenizer=dict(pretrained_model_name_or_path=path),\n    max_length",
    }  # fmt: skip
    found = draft(replace=dotted | copies)
    assert found.values == draft().values
    assert found.lost == []


@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        ({"openai_map_fn,\n": "'my_code.my_map_fn',\n"}, "is a custom function"),
        ({"openai_map_fn": "msagent_react_map_fn"}, "ReAct"),
        ({"bias='none'": "use_qalora=True"}, "lora.use_qalora"),
        ({"type=LoraConfig": "type='peft.IA3Config'"}, "is not LoraConfig"),
        ({"type=template_map_fn_factory": "type='my.factory'"}, "template_map_fn = 'my.factory'"),
        ({"    tokenizer=tokenizer,\n    max_length":
          "    tokenizer=dict(pretrained_model_name_or_path='other'),\n    max_length"},
         "the tokenizer is always loaded"),
        ({"begin=0, end=warmup": "begin=0.1, end=warmup"}, "the warmup must begin at 0"),
        ({"load_from = None": "load_from = 'w.pth'"}, "add `--resume w.pth`"),
        ({"pretrained_model_name_or_path=path, padding_side":
          "pretrained_model_name_or_path='other', padding_side"}, "the tokenizer is always loaded"),
        ({"end=epochs": "end=epochs * 2"}, "the decay must begin"),
        ({"convert_to_iter_based=True),\n    dict": "convert_to_iter_based=False),\n    dict"},
         "once per epoch"),
        ({"lr=lr, betas": "lr=float(open('lr').read()), betas"}, "write the value itself"),
        ({"type=AdamW, lr": "type='my.optim.Mine', lr"}, "neither torch.optim"),
        ({"longest = 512": "longest = 4"}, "max_length = 4: must be"),
    ],
    ids=range(14),
)  # fmt: skip
def test_config_whose_meaning_would_change_is_rejected(draft, replace, reason):
    found = draft(replace=replace)
    assert found.outcome == "refused"
    assert reason in words(found.refused)
    assert all(item.line for item in found.refused)


def test_variants_of_adapters_become_fields_of_lora_config(draft):
    found = draft(replace={"bias='none'": "bias='all', use_rslora=True, use_dora=False"})
    assert found.outcome == "migrated"
    assert found.values["lora_config"] == {"bias": "all", "use_rslora": True}


def test_an_unknown_hook_is_lost_with_its_line(draft):
    found = draft(
        replace={"custom_hooks = [\n": "custom_hooks = [\n    dict(type='my.EarlyStop'),\n"}
    )
    assert found.outcome == "with losses"
    assert "my.EarlyStop" in words(found.lost)
    assert found.lost[0].line == 84


def test_an_unknown_key_is_lost_not_dropped(draft):
    found = draft(replace={"batch_size=1,": "batch_size=1, drop_last=True,"})
    assert "train_dataloader.drop_last = True" in words(found.lost)


def test_a_template_of_ones_own_is_written_beside(draft, tmp_path, monkeypatch):
    own = "template = dict(SYSTEM='S:{system}\\n', INSTRUCTION='Q:{input}\\nA:', SEP='\\n')"
    draft(replace={"template = PROMPT_TEMPLATE.internlm2_chat": own})
    monkeypatch.chdir(tmp_path)
    file.migrate(tmp_path / "my_old.py", tmp_path / "new.py")
    assert load_settings("new.py").settings.prompt_template == "new_template.py:TEMPLATE"
    tokenizer = tiny_tokenizer()
    template = load("new_template.py:TEMPLATE", tokenizer, folder=tmp_path)
    messages = [Message("system", "s"), Message("user", "q"), Message("assistant", "a")]
    expected = f"{tokenizer.bos_token or ''}S:s\nQ:q\nA:a{tokenizer.eos_token}\n"
    assert template.render(messages).text == expected


@pytest.mark.parametrize("kind", ["DPO", "ORPO", "RewardModel", "InternVL_V1_5"])
def test_unsupported_methods_are_reported_as_not_yet(draft, kind):
    found = draft(replace={"type=SupervisedFinetune": f"type='xtuner.model.{kind}'"})
    assert found.outcome == "not yet"
    assert found.not_yet[0].line == 36


def test_dialogues_of_moss_are_learnt_as_they_are_written(draft, tmp_path, monkeypatch):
    start, end = SFT.index("train_dataset = dict("), SFT.index("train_dataloader = dict(")
    data = SFT[start:end]
    moss = (
        "train_dataset = dict(type='xtuner.dataset.MOSSSFTDataset', data_file='moss.jsonl',\n"
        "    bot_name='Ada', tokenizer=tokenizer, max_length=longest)\n"
    )
    replace = {
        data: moss,
        "PROMPT_TEMPLATE.internlm2_chat": "PROMPT_TEMPLATE.moss_sft",
        "system=SYSTEM": "stop_words=['<eoc>'], system=SYSTEM",
    }
    found = draft(replace=replace)
    assert (found.outcome, found.lost) == ("migrated", [])
    monkeypatch.chdir(tmp_path)
    file.migrate(tmp_path / "my_old.py", tmp_path / "new.py")
    settings = load_settings("new.py").settings
    assert settings.dataset_format == ("new_format.py:to_messages",)
    assert settings.prompt_template == "verbatim"
    assert settings.evaluation_inputs == ("<|Human|>: Who are you?<eoh>\n",)
    assert settings.evaluation_stop_words == ("<eoc>", "<eom>")
    format = resolve("new_format.py:to_messages", columns=("chat",), folder=tmp_path)
    turn = {"Human": "<|Human|>: Hi<eoh>\n", "Commands": "<|Commands|>: f()<eoc>\n",
            "Tool Responses": "<|Results|>: 5<eor>\n", "MOSS": "<|MOSS|>: 5<eom>\n"}  # fmt: skip
    said = format.convert({"meta_instruction": "You are MOSS.\n", "chat": {"turn_1": turn}})
    assert [(m.supervised, m.content) for m in said.messages] == [
        (False, "You are Ada.\n"),
        (True, "<|Human|>: Hi<eoh>\n<|Commands|>: f()<eoc>\n<|Results|>:"),
        (False, " 5"),
        (True, "<eor>\n<|Ada|>: 5<eom>\n"),
    ]
    rendered = load("verbatim", tiny_tokenizer()).render(said.messages)
    assert rendered.text.endswith("".join(message.content for message in said.messages))
    assert len(rendered.turns) == 2


def test_a_config_for_the_trainer_of_transformers(draft):
    start, end = SFT.index("model = dict("), SFT.index("train_dataset = dict(")
    text = (
        "framework = 'huggingface'\n"
        + SFT[: SFT.index("train_dataloader = dict(")].replace(
            SFT[start:end],
            "model = dict(type=AutoModelForCausalLM.from_pretrained,\n"
            "    pretrained_model_name_or_path=path)\n"
            "lora = dict(type=LoraConfig, r=4, lora_alpha=8)\n",
        )
        + "training_args = dict(type='transformers.TrainingArguments', learning_rate=1e-4,\n"
        "    warmup_steps=100, per_device_train_batch_size=2, num_train_epochs=1, fp16=True,\n"
        "    optim='paged_adamw_32bit', save_steps=50)\n"
    )
    found = draft(text)
    assert (found.outcome, found.lost) == ("migrated", [])
    expected = {
        "tuning": "lora",
        "lora_r": 4,
        "warmup_steps": 100,
        "batch_size": 2,
        "max_epochs": 1,
        "optim_type": "PagedAdamW32bit",
        "save_steps": 50,
        "dataset_format": ["openai"],
    }
    assert {name: found.values.get(name) for name in expected} == expected
    assert "steps_are" not in found.values


def test_a_config_that_a_run_under_deepspeed_wrote(draft):
    start, end = SFT.index("optim_wrapper = dict("), SFT.index("param_scheduler = [")
    wrapper = (
        "optim_wrapper = dict(type='mmengine._strategy.deepspeed.DeepSpeedOptimWrapper',\n"
        "    optimizer=dict(type=AdamW, lr=lr, betas=(0.9, 0.999), weight_decay=0))\n"
        "strategy = dict(type='xtuner.engine.DeepSpeedStrategy',\n"
        "    config=dict(zero_optimization=dict(stage=2)), gradient_clipping=0.5,\n"
        "    gradient_accumulation_steps=16, train_micro_batch_size_per_gpu=1)\n"
        "runner_type = 'FlexibleRunner'\n"
    )
    found = draft(replace={SFT[start:end]: wrapper})
    assert found.values["accumulative_counts"] == 16
    assert found.values["max_norm"] == 0.5
    assert words(found.lost).count("strategy = DeepSpeedStrategy") == 1
    found = draft(replace={SFT[start:end]: wrapper.replace("steps=16", "steps='auto'")})
    assert "write the number of micro-batches" in words(found.refused)


def test_another_visualizer_is_lost(draft):
    wandb = "visualizer = dict(vis_backends=[dict(type='mmengine.visualization.WandbVisBackend')])"
    assert "WandbVisBackend" in words(draft(replace={"visualizer = None": wandb}).lost)


@pytest.mark.parametrize(
    "more",
    [
        "model.itself = model\nmodel.update(dict(again=model))\n",
        "model = dict(type='a')\n" + "model = dict(b=model)\n" * 1200,
        "optim_wrapper.optimizer = 5\n",
        "param_scheduler = [5]\ntrain_dataloader = 7\n",
        "train_cfg = dict(max_epochs='many')\ncustom_hooks = dict(a=1)\n",
        "del model\n",
        "randomness = dict(seed='x')\n",
    ],
    ids=["itself", "deep", "number", "numbers", "texts", "none", "seed"],
)
def test_malformed_config_raises_a_config_error(draft, more):
    try:
        found = draft(SFT + more)
    except ConfigError:
        return
    assert found.outcome in ("refused", "with losses")
