"""The built-in settings with images. A name combines a stage, a chat model and a vision tower.

llava_internlm2_chat_1_8b_clip_vit_large_p14_336_e1_gpu8_pretrain
      └ models.toml       └ llava.toml           └ max_epochs
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from xtuner.config.table_files import table

CONTEXT = 2048
"""Maximum tokens of a sample including one image."""


class Name(NamedTuple):
    """The parts of a name."""

    stage: str
    model: str
    encoder: str
    epochs: int


def names(models: list[str]) -> list[str]:
    """All names for the chat `models`."""
    return [
        stage["name"].format(model=model, encoder=encoder, epochs=stage["epochs"])
        for model in models
        for encoder in table("llava")["encoders"]
        for stage in table("llava")["stages"].values()
    ]


def split(name: str, models: list[str]) -> Name | None:
    """Split `name` into its parts; None if it is not a built-in with images."""
    encoders = table("llava")["encoders"]
    for key, stage in table("llava")["stages"].items():
        pattern = stage["name"].format(
            model=f"(?P<model>{'|'.join(models)})",
            encoder=f"(?P<encoder>{'|'.join(encoders)})",
            epochs=r"(?P<epochs>[1-9]\d{0,3})",
        )
        if match := re.fullmatch(pattern, name, flags=re.ASCII):
            return Name(key, match["model"], match["encoder"], int(match["epochs"]))
    return None


def compose(name: Name, model: dict[str, Any], *, suffix: str = "") -> dict[str, Any]:
    """Return the settings of `name`.

    Args:
        name: The parts of the name.
        model: The settings of the language model.
        suffix: Appended to the name of the first stage's settings file, hence of its work dir.
    """
    encoder, stage = table("llava")["encoders"][name.encoder], table("llava")["stages"][name.stage]
    values = {
        **model,
        "visual_encoder_name_or_path": encoder["path"],
        **stage["settings"],
        **table("llava")["settings"],
        "max_length": CONTEXT - encoder["tokens"],
        "max_epochs": name.epochs,
    }
    if name.stage == "finetune":
        first = table("llava")["stages"]["pretrain"]
        first_name = first["name"].format(
            model=name.model, encoder=name.encoder, epochs=first["epochs"]
        )
        values["pretrained_pth"] = f"./work_dirs/{first_name}{suffix}"
    return values


def note(name: Name) -> str:
    """Manual steps before training."""
    return str(table("llava")["stages"][name.stage]["note"])
