"""Translate configs of XTuner 0.x that use transformers' Trainer instead of mmengine's loop."""

from __future__ import annotations

from xtuner.migrate.report import Draft, shown
from xtuner.migrate.values import Table, unused
from xtuner.migrate.xtuner import data as old_data
from xtuner.migrate.xtuner import model
from xtuner.migrate.yaml_trainers.flat import training_arguments

_NO_INFLUENCE = ("type", "do_train", "ddp_find_unused_parameters", "report_to", "logging_dir")


def read(config: Table, draft: Draft) -> None:
    """Translate model, adapter, data and ``training_args``, which count optimizer steps."""
    llm = config.table("model")
    model.read_language_model(llm, draft)
    model.read_adapter(config.optional("lora"), llm, draft)
    model.read_tokenizer(config, draft)
    arguments = config.table("training_args")
    training_arguments(arguments, draft)
    data = config.take("train_dataset")
    if not isinstance(data, Table):
        draft.refuse(config.line_of("train_dataset"), "train_dataset", "is missing")
        return
    old_data.read_data(data, config, draft)
    draft.set("evaluation_inputs", [], config.line_of("training_args"))
    draft.carry(arguments, "output_dir", "work_dir")
    arguments.pass_over(*_NO_INFLUENCE)
    for key in ("model", "lora", "train_dataset", "training_args"):
        for line, path, value in unused(config.get(key), key):
            if value not in (None, False):
                draft.lose(line, shown(path, value), "has no counterpart")
