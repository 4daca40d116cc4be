"""What a checkpoint says about itself: the file ``run.yaml`` next to the weights.

Written by the engine with every checkpoint and read by chat, convert and resume, so that base
model, adapter and template cannot disagree.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from xtuner import plugins
from xtuner.config.schema import Settings
from xtuner.errors import CheckpointError
from xtuner.hub.sharing import last_parts, public_name, shareable
from xtuner.version import __version__

FILE_NAME = "run.yaml"
_TEXTS = ("SYSTEM", "evaluation_system", "evaluation_inputs", "evaluation_stop_words")
"""Settings that are texts, which the model reads or writes."""
_LOCAL = (*Settings.paths(), "work_dir", "image_folder", "evaluation_images", "strategy")
"""Settings that may name a file or folder of this machine."""


@dataclass(frozen=True)
class RunInfo:
    """The facts of the run that wrote a checkpoint.

    Attributes:
        kind: 'adapter' (needs `base_model`), 'model' (complete), or 'llava' (the trained parts of a
            LLaVA model; needs `base_model` and `visual_encoder`).
        base_model: The model that the run started from; a folder is an absolute path.
        prompt_template: Name of the template; 'auto' for the tokenizer's own.
        system: The default system message.
        step, epoch: Completed optimizer steps and epochs (a fraction).
        settings: All settings of the run, resolved.
        versions: Library versions by name.
        visual_encoder: For a 'llava', the encoder that the run started from.
        dtype: The dtype that the run computed in, because the setting may be 'auto'; empty if not
            recorded.
        template: The fields of a user's template, so that chat does not need the file that
            `prompt_template` names.
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
        """Refuse values of other types: the file is untrusted."""
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
        """Name of the dtype that the run computed in; empty or 'auto' if unknown."""
        return self.dtype or str(self.settings.get("dtype", ""))

    def without_local_paths(self) -> RunInfo:
        """These facts without folders of this machine, for files that may be shared. What an
        adapter needs to find its base model, a LLaVA its base model and vision tower, and what the
        model reads are kept."""
        complete = self.kind == "model"
        base = public_name(self.base_model) if complete else self.base_model
        encoder = public_name(self.visual_encoder) if complete else self.visual_encoder
        settings = without_folders(self.settings)
        if "pretrained_model_name_or_path" in settings:
            settings["pretrained_model_name_or_path"] = base
        template = last_parts(self.prompt_template) if self.template else self.prompt_template
        return replace(
            self,
            base_model=base,
            visual_encoder=encoder,
            prompt_template=template,
            settings=settings,
        )

    def write(self, folder: Path) -> None:
        """Write ``folder/run.yaml``."""
        text = yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
        (folder / FILE_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> RunInfo | None:
        """Read ``folder/run.yaml``; None if it does not exist.

        Raises:
            CheckpointError: The file is damaged.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            return None
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            return cls(**values)
        except (
            yaml.YAMLError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            AttributeError,
        ) as error:
            raise CheckpointError(f"{path}: is not an xtuner run file: {error}") from error
        except RecursionError as error:
            raise CheckpointError(f"{path}: is nested too deeply for a run file") from error


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, with the last part of each path of this machine."""
    return {
        name: value if name in _TEXTS else _shared(name, shareable(value))
        for name, value in settings.items()
    }


def _shared(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_shared(name, item) for item in value]
    local = name in _LOCAL or (isinstance(value, str) and plugins.is_user_path(value))
    return last_parts(value) if local else value


def installed_versions() -> dict[str, str]:
    """Versions of xtuner and of the libraries that affect a run's results."""
    found = {"xtuner": __version__}
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
