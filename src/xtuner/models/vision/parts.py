"""The parts of a LLaVA model in training: which are trained, and how they lie in a folder.

    iter_N/   projector/model.safetensors  config.json      always
              llm_adapter/           or  llm/                where the language model is trained
              visual_encoder_adapter/  or  visual_encoder/   where the vision tower is
              run.yaml  tokenizer

Each part is of use alone: the adapters are plain PEFT adapters of the language model and of the
vision tower. Folders that xtuner 0.1 wrote have the same names, and are read as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from xtuner.config.schema import Settings
from xtuner.errors import ModelError
from xtuner.hub.weight_files import tensors_of
from xtuner.models import adapters
from xtuner.models.run_info import RunInfo
from xtuner.models.save import save_model
from xtuner.models.vision.llava import ImageEmbedder, Keep, PackedVisionLM, assemble
from xtuner.models.vision.tower import Processor, load_vision_tower

PROJECTOR, LLM, ENCODER = "projector", "llm", "visual_encoder"
LLM_ADAPTER, ENCODER_ADAPTER = "llm_adapter", "visual_encoder_adapter"

_OLD_NAMES = {"model.0.": "linear_1.", "model.2.": "linear_2."}
_WHOLE = re.compile(r"^(model\.)?multi_modal_projector\.")


def is_llava_folder(folder: Path) -> bool:
    """Whether `folder` holds the parts of a LLaVA model."""
    return (folder / PROJECTOR).is_dir()


def run_of(folder: Path) -> RunInfo | None:
    """The run that wrote `folder`: what its run.yaml says, or that of the LLaVA model it is a part
    of."""
    info = RunInfo.read(folder)
    return RunInfo.read(folder.parent) if info is None and is_llava_folder(folder.parent) else info


@dataclass
class Parts:
    """A LLaVA model in training.

    Attributes:
        packed: what the algorithms see.
        llm, encoder: the language model and the vision tower, in PEFT's wrapper where they have
            adapters.
        settings: say what is trained.
        processor: of the images; kept with an encoder that is trained in full.
    """

    packed: PackedVisionLM
    llm: Any
    encoder: Any
    settings: Settings
    processor: Processor

    @property
    def llava(self) -> Any:
        """The assembled model."""
        return self.packed.model

    def save(self, folder: Path) -> None:
        """Write the parts that are trained."""
        save_projector(self.llava, folder / PROJECTOR)
        for model, training, adapter, whole in (
            (self.llm, self.settings.llm_training, LLM_ADAPTER, LLM),
            (self.encoder, self.settings.visual_encoder_training, ENCODER_ADAPTER, ENCODER),
        ):
            if training != "frozen":
                save_model(model, folder / (adapter if training == "adapter" else whole))
        if self.settings.visual_encoder_training == "full":
            self.processor.upstream.save_pretrained(folder / ENCODER)

    def table(self) -> Iterator[str]:
        """What of each part is trained, a line each."""
        model, s = self.llava.model, self.settings
        llm = (model.language_model, self.llava.lm_head)
        rows = (
            ("projector", model.multi_modal_projector, "full"),
            ("language model", llm, s.llm_training),
            ("vision tower", model.vision_tower, s.visual_encoder_training),
        )
        for name, modules, how in rows:
            holder = nn.ModuleList(modules if isinstance(modules, tuple) else [modules])
            trained, everything = adapters.count_parameters(holder)
            words = {"full": "all its weights", "adapter": "adapters", "frozen": "frozen"}[how]
            yield f"{name:<16}{trained:>14,} of {everything:>14,} trained   {words}"


def make(
    settings: Settings,
    llm: Any,
    *,
    image_token_id: int,
    dtype: torch.dtype,
    device: str,
    source: Path | None = None,
    projector: Path | None = None,
    keep: Keep | None = None,
) -> Parts:
    """Join `llm` (with its adapters) to the vision tower as `settings` say.

    Args:
        settings: of the run.
        llm: the language model, or a PeftModel around it.
        image_token_id: the token ``<image>``.
        dtype: of the computation, and of frozen weights.
        device: where the model is.
        source: the checkpoint to go on from.
        projector: where the projector comes from if there is no `source`.
        keep: keeps features of a frozen encoder.

    Raises:
        ModelError: the parts do not fit together.
    """
    assert settings.visual_encoder_name_or_path is not None
    training = settings.visual_encoder_training
    full = training == "full"
    name = settings.visual_encoder_name_or_path
    place = source / ENCODER if full and source is not None else name
    encoder: Any = load_vision_tower(place, dtype=torch.float32 if full else dtype, device=device)
    llava = assemble(
        llm.get_base_model() if hasattr(llm, "get_base_model") else llm,
        encoder,
        image_token_id=image_token_id,
        select_layer=settings.visual_select_layer,
        seed=settings.seed,
    )
    if settings.llm_training == "frozen":
        llm.requires_grad_(False)
    encoder.requires_grad_(False)
    if full:
        for part in used_layers(encoder, settings.visual_select_layer):
            part.requires_grad_(True)
    elif training == "adapter":
        encoder = with_adapter(encoder, settings)
    if source is not None:
        load_projector(llava, source)
        if training == "adapter":
            adapters.load_adapter_weights(encoder, source / ENCODER_ADAPTER)
    elif projector is not None:
        load_projector(llava, projector)
    mixed = dtype if dtype != torch.float32 else None
    embedder = ImageEmbedder(llava, train_encoder=training != "frozen", autocast=mixed, keep=keep)
    autocast = mixed if settings.llm_training == "full" else None
    packed = PackedVisionLM(llava, embedder, autocast=autocast)
    return Parts(packed, llm, encoder, settings, Processor(name, settings.pad_image_to_square))


def used_layers(encoder: Any, select_layer: int) -> list[nn.Module]:
    """The parts of the encoder before the selected layer; the others never get gradients."""
    count = select_layer if select_layer >= 0 else len(encoder.encoder.layers) + 1 + select_layer
    before = [encoder.embeddings, getattr(encoder, "pre_layrnorm", None)]
    return [part for part in (*before, *encoder.encoder.layers[:count]) if part is not None]


def with_adapter(encoder: Any, settings: Settings) -> Any:
    """The encoder with adapters beside the linear layers that are used."""
    names = {id(module): name for name, module in encoder.named_modules()}
    targets = [
        names[id(module)]
        for layer in used_layers(encoder, settings.visual_select_layer)
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    ]
    return adapters.add_adapter(
        encoder,
        r=settings.visual_encoder_lora_r or 1,
        alpha=settings.visual_encoder_lora_alpha,
        dropout=settings.visual_encoder_lora_dropout,
        target_modules=targets,
        seed=settings.seed + 1,
        task_type=None,
    )


def save_projector(llava: Any, folder: Path) -> None:
    """Write the projector alone."""
    folder.mkdir(parents=True, exist_ok=True)
    state = llava.model.multi_modal_projector.state_dict()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "visual_hidden_size": llava.config.vision_config.hidden_size,
        "llm_hidden_size": llava.config.get_text_config().hidden_size,
        "hidden_act": llava.config.projector_hidden_act,
        "visual_select_layer": llava.config.vision_feature_layer,
        "depth": 2,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def load_projector(llava: Any, folder: Path) -> None:
    """Fill the projector of `llava` with the one in `folder`.

    Args:
        llava: the assembled model.
        folder: a projector, a folder of parts that has one, or a whole LLaVA model.

    Raises:
        ModelError: there is none, or it is of another shape.
    """
    found = read_projector(folder)
    projector = llava.model.multi_modal_projector
    wanted = {name: tuple(p.shape) for name, p in projector.named_parameters()}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != wanted:
        differing = sorted(n for n in {*wanted, *shapes} if wanted.get(n) != shapes.get(n))
        name = differing[0]
        raise ModelError(
            f"{folder}: the projector does not fit this language model and vision tower: {name} "
            f"is {shapes.get(name, 'missing')} and must be {wanted.get(name, 'absent')}"
        )
    projector.load_state_dict(found)


def read_projector(folder: Path) -> dict[str, Tensor]:
    """The tensors ``linear_1.weight`` ... of the projector in `folder`; see `load_projector`.

    Raises:
        ModelError: there is none.
    """
    folder = folder.with_suffix("") if folder.suffix == ".pth" else folder
    if (folder / "last_checkpoint").is_file():
        folder = folder / (folder / "last_checkpoint").read_text(encoding="utf-8").strip()
    place = folder / PROJECTOR if is_llava_folder(folder) else folder
    files = sorted(place.glob("*.safetensors")) or sorted(place.glob("*.bin"))
    found: dict[str, Tensor] = {}
    for file in files:
        found |= {_projector_name(n): t for n, t in tensors_of(file, _projector_name).items()}
    if not found:
        there = ", ".join(sorted(p.name for p in place.glob("*"))[:8]) if place.is_dir() else ""
        raise ModelError(
            f"{folder}: holds no projector (found: {there or 'no such folder'}); give a checkpoint "
            "iter_N of a run with a vision tower, or its folder projector/"
        )
    return found


def projectors_beside(place: Path) -> list[str]:
    """Folders beside `place`, which is not there, whose newest checkpoint has a projector."""
    pointers = sorted(place.parent.glob("*/last_checkpoint"))
    return [
        str(pointer.parent)
        for pointer in pointers
        if is_llava_folder(pointer.parent / pointer.read_text(encoding="utf-8").strip())
    ]


def _projector_name(name: str) -> str:
    """The name without what stands before it in a whole model; empty for other tensors."""
    name = _WHOLE.sub("", name)
    for old, new in _OLD_NAMES.items():
        if name.startswith(old):
            return name.replace(old, new, 1)
    return name if re.fullmatch(r"linear_[12]\.(weight|bias)", name) else ""
