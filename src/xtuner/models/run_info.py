"""What a checkpoint says of itself: the file ``run.yaml`` beside the weights.

Written by the engine with every checkpoint and read by chat, convert and resume, so that base
model, adapter and template cannot disagree.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from xtuner.errors import CheckpointError
from xtuner.version import __version__

FILE_NAME = "run.yaml"


@dataclass(frozen=True)
class RunInfo:
    """The facts of the run that wrote a checkpoint.

    Attributes:
        kind: 'adapter' (needs `base_model`), 'model' (complete), or 'llava' (the trained parts of
            a LLaVA model; needs `base_model` and `visual_encoder`).
        base_model: the model the run started from; a folder is given as an absolute path.
        prompt_template: name of the template, 'auto' for the tokenizer's own.
        system: the default system message.
        step, epoch: optimizer steps done, epochs gone through (a fraction).
        settings: all settings of the run, resolved.
        versions: library name to version.
        visual_encoder: of a 'llava', the encoder the run started from.
        dtype: number type that the run computed in, where the setting may be 'auto'; empty if
            nobody wrote it down.
        template: the fields of the user's own template, so that the file which `prompt_template`
            names is not needed to chat.
    """

    kind: Literal["adapter", "model", "llava"]
    base_model: str
    prompt_template: str = "auto"
    system: str = ""
    step: int = 0
    epoch: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    visual_encoder: str = ""
    dtype: str = ""
    template: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values of other types: the file may come from anyone."""
        texts = ("kind", "base_model", "prompt_template", "system", "visual_encoder", "dtype")
        kinds: dict[str, Any] = dict.fromkeys(texts, str)
        kinds |= dict.fromkeys(("settings", "versions", "template"), Mapping)
        kinds |= {"step": int, "epoch": (int, float)}
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind):
                raise TypeError(f"{name}: cannot be {value!r:.60}")
        if self.kind not in ("adapter", "model", "llava"):
            raise TypeError(f"kind: must be adapter, model or llava, and is {self.kind!r:.60}")

    @property
    def computed_in(self) -> str:
        """Name of the number type that the run computed in; empty or 'auto' if nobody knows."""
        return self.dtype or str(self.settings.get("dtype", ""))

    def write(self, folder: Path) -> None:
        """Write ``folder/run.yaml``."""
        text = yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
        (folder / FILE_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> RunInfo | None:
        """Read ``folder/run.yaml``; None where there is none.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            return None
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            return cls(**values)
        except (yaml.YAMLError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise CheckpointError(f"{path}: is not a run file of xtuner: {error}") from error
        except RecursionError as error:
            raise CheckpointError(f"{path}: is nested too deeply for a run file") from error


def installed_versions() -> dict[str, str]:
    """Versions of xtuner and of the libraries that make a run's numbers."""
    found = {"xtuner": __version__}
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
