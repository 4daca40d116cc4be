"""Merge an adapter into its base model, and prove it.

    base files ──tensor by tensor, + scaling · B A──► shards ──reload──► same logits as
         └─ what only a model understands: PEFT, in memory ──┘           base + adapter?

The base is not quantised, even if the adapter was trained on a quantised one: merging into 4-bit
weights would round them anew, which costs far more than the difference between the two bases.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from xtuner.convert import compare, lora
from xtuner.convert.output import copy_others, new_folder
from xtuner.convert.to_hf import find_checkpoint, same_base
from xtuner.convert.weights import (
    Planned,
    Weights,
    cast_plan,
    main_dtype,
    parse_size,
    total_bytes,
    write_config,
    write_shards,
)
from xtuner.device.select import DTYPES, pick_device
from xtuner.errors import ModelError
from xtuner.hub import fetch
from xtuner.models.adapters import load_adapter
from xtuner.models.load import load_tokenizer, read_config
from xtuner.models.quantize import Rounding
from xtuner.models.run_info import RunInfo
from xtuner.models.save import save_model
from xtuner.models.vision.folder import LLM_ADAPTER, run_of

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Tell = Callable[[str], None]

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template.*", "additional_chat_templates/*", "spiece.model", "*.tiktoken",
)  # fmt: skip
_NOT_COPIED = (
    "*.safetensors", "*.bin", "*.index.json", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack",
    "*.onnx*", "README.md", "run.yaml", "adapter_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class MergeReport:
    """What a merge found when it read its result again.

    Attributes:
        max_difference: largest difference of a logit to base + adapter; None where memory did not
            allow it.
        relative: the same as a share of the largest logit.
        how: file by file, or with the whole model in memory.
    """

    max_difference: float | None
    relative: float | None
    how: Literal["by shard", "in memory"]


def merge(
    llm: str | Path,
    adapter: Path,
    save_dir: Path,
    *,
    max_shard_size: str = "2GB",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    tell: Tell = print,
) -> MergeReport:
    """Write the model `llm` with `adapter` merged into its weights to `save_dir`.

    Args:
        llm: the base model: a folder, a name that was fetched, or a hub name.
        adapter: a PEFT adapter: a folder of its own, an ``iter_N``, or a work dir; of a LLaVA run,
            the adapter of the language model.
        save_dir: a new folder.
        max_shard_size: of the files, such as '2GB'.
        device: where it is computed.
        dtype: of the result; 'auto' is that of the base model's files.
        trust_remote_code: run Python code that lies beside the base model's weights.
        tell: gets lines of progress and warnings.

    Raises:
        ModelError: the adapter does not fit, or the result differs from base + adapter.
        LaunchError: `save_dir` is taken, or the disk is too full.
    """
    place = find_checkpoint(adapter)
    job = _Merge(
        llm=str(llm),
        adapter=place / LLM_ADAPTER if (place / LLM_ADAPTER).is_dir() else place,
        max_bytes=parse_size(max_shard_size),
        device=pick_device(device),
        wanted_dtype=DTYPES.get(dtype),
        trust_remote_code=trust_remote_code,
        tell=tell,
    )
    return job.run(save_dir)


@dataclass(frozen=True)
class _Merge:
    llm: str
    adapter: Path
    max_bytes: int
    device: str
    wanted_dtype: torch.dtype | None
    trust_remote_code: bool
    tell: Tell

    @property
    def folder(self) -> Path | None:
        """The base model's folder, if it is on this machine."""
        folder = Path(self.llm).expanduser()
        return folder if folder.is_dir() else fetch.cached(self.llm)

    @cached_property
    def rounding(self) -> Rounding | None:
        """What quantisation did to the weights that the adapter was trained beside."""
        info = run_of(self.adapter)
        return Rounding.of_run(info.settings, info.computed_in) if info else None

    @property
    def place(self) -> str:
        """What the base model is loaded from."""
        return str(self.folder or self.llm)

    def run(self, save_dir: Path) -> MergeReport:
        """Merge, add the other files, check."""
        config = lora.read_adapter_config(self.adapter)
        weights = Weights.of_adapter(self.adapter)
        info = self._run_info()
        if self.rounding:
            self.tell(
                f"The adapter was trained beside {self.rounding.quant_type} weights: they are "
                "dequantised, and it is merged into them."
            )
        how: Literal["by shard", "in memory"] = "by shard"
        try:
            base, plan, changes = self._plan(weights, config)
        except lora.NeedsModel as reason:
            self.tell(f"Merging in memory, with the whole model loaded: {reason}.")
            how, plan = "in memory", self._expected_plan()
        with new_folder(save_dir, num_bytes=total_bytes(plan)) as draft:
            if how == "by shard":
                self._write_shards(draft, base, weights, plan, changes)
            else:
                self._merge_in_memory(draft, config)
            self._copy_others(draft)
            info.write(draft)
            difference = self._check(draft)
        if difference is None:
            return MergeReport(None, None, how)
        return MergeReport(difference.of_merged, difference.relative, how)

    def _run_info(self) -> RunInfo:
        base = str(self.folder.resolve()) if self.folder and Path(self.llm).is_dir() else self.llm
        info = run_of(self.adapter)
        if info is None:
            return RunInfo(kind="model", base_model=base)
        if not same_base(info.base_model, self.llm):
            self.tell(
                f"Warning: {self.adapter} was trained on {info.base_model}, "
                f"and is merged into {self.llm}."
            )
        return replace(info, kind="model", base_model=base, visual_encoder="")

    def _plan(
        self, adapter: Weights, config: dict[str, Any]
    ) -> tuple[Weights, dict[str, Planned], dict[str, lora.Change]]:
        """What will be in the files, and how it comes about."""
        if self.folder is None:
            raise lora.NeedsModel(f"{self.llm} is not a folder on this machine")
        try:
            base = Weights.of_model(self.folder, safetensors_only=True)
        except ModelError as error:
            raise lora.NeedsModel(str(error)) from error
        changes = lora.changes(adapter, config, base.stored, read_config(self.place))
        sources = {n: base.stored[c.source] for n, c in changes.items()}
        return base, cast_plan({**base.stored, **sources}, self.wanted_dtype), changes

    def _expected_plan(self) -> dict[str, Planned]:
        """For the disk check of a merge in memory: as many bytes as the base model's files have."""
        if self.folder is None:
            return {}
        files = [*self.folder.glob("*.safetensors"), *self.folder.glob("*.bin")]
        size = max(sum(f.stat().st_size for f in files if f.suffix == kind) for kind in
                   (".safetensors", ".bin"))  # fmt: skip
        return {"": Planned(torch.uint8, (size,))}

    def _write_shards(
        self, draft: Path, base: Weights, adapter: Weights, plan: dict[str, Planned],
        changes: dict[str, lora.Change],
    ) -> None:  # fmt: skip
        def read(name: str) -> torch.Tensor:
            if name in changes:
                return changes[name].apply(seen, adapter, device=self.device)
            return seen[name]

        seen = _Rounded(base, self.rounding, self.place) if self.rounding else base
        write_shards(draft, plan, read, max_bytes=self.max_bytes, tell=self.tell)
        assert self.folder is not None
        write_config(self.folder, draft, dtype=main_dtype(plan), untie=lora.HEAD in changes)

    def _merge_in_memory(self, draft: Path, config: dict[str, Any]) -> None:
        model = compare.load_plain(
            self.place, dtype=self._memory_dtype(), device=self.device,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip
        if self.rounding:
            self.rounding.apply(model)
        if not config.get("ensure_weight_tying"):
            _part_tied(model, Weights.of_adapter(self.adapter))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie")
            adapted = load_adapter(model, self.adapter)
            try:
                merged = adapted.merge_and_unload().to(model.dtype)
            except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
                raise ModelError(
                    f"{self.adapter}: PEFT cannot merge this kind of adapter: {error}; "
                    f"use it beside the model: xtuner chat {self.llm} --adapter {self.adapter}"
                ) from error
        save_model(merged, draft, max_shard_size=f"{max(1, self.max_bytes // 1000)}KB")

    def _memory_dtype(self) -> torch.dtype:
        """The type asked for, or the one that the base model's config.json names."""
        config = read_config(self.place)
        name = str(config.get("dtype") or config.get("torch_dtype"))
        return self.wanted_dtype or DTYPES.get(name, torch.bfloat16)

    def _copy_others(self, draft: Path) -> None:
        """Add the base model's other files; the adapter's tokenizer, if any, replaces its own."""
        own = (self.adapter / "tokenizer_config.json").is_file()
        if own:
            copy_others(self.adapter, draft, only=TOKENIZER_FILES)
        if self.folder is not None:
            copy_others(self.folder, draft, skip=(*_NOT_COPIED, *(TOKENIZER_FILES if own else ())))
        elif not own:
            with contextlib.suppress(ModelError):  # a model without a tokenizer stays one
                load_tokenizer(self.llm, trust_remote_code=self.trust_remote_code).save_pretrained(
                    str(draft)
                )

    def _check(self, draft: Path) -> compare.Difference | None:
        """Compare what was written with base + adapter.

        Raises:
            ModelError: they differ.
        """
        plan = cast_plan(Weights.of_model(draft).stored, None)
        stored = main_dtype(plan)
        parameters = sum(p.num_bytes // p.dtype.itemsize for p in plan.values())
        computed = compare.fitting_dtype(parameters, stored, device=self.device)
        if computed is None:
            self.tell(
                "Warning: too little memory to load the model, so the result was not compared."
            )
            return None
        self.tell("Reading the result again and comparing it with base + adapter ...")
        found = compare.compare(
            self.place, self.adapter, draft, dtype=computed, device=self.device,
            trust_remote_code=self.trust_remote_code, rounding=self.rounding,
        )  # fmt: skip
        # In a short type, rounding of the computation comes on top of rounding of the weights.
        bound = compare.BOUNDS.get(stored, 1e-4) * (1 if computed == torch.float32 else 2)
        # Rounding of short types can exceed the bound when the adapter changes much; what tells a
        # wrong merge from a rounded one is that it loses most of what the adapter does.
        lost = found.of_merged > 0.5 * found.of_adapter > 0
        if found.relative > bound and (lost or stored == torch.float32):
            raise ModelError(
                f"the merged model differs from {self.llm} + {self.adapter}: a logit by "
                f"{found.of_merged:.3g}, {found.relative:.2%} of the largest, where rounding to "
                f"{stored} explains {bound:.2%}. "
                "Nothing was written. Is this the model the adapter was trained on?"
            )
        if found.relative > bound:
            self.tell(
                f"Warning: rounding to {stored} moves a logit by up to {found.of_merged:.3g} "
                f"({found.relative:.2%} of the largest; the adapter moves them by up to "
                f"{found.of_adapter:.3g}). --dtype float32 is exact."
            )
        elif lost:
            self.tell(
                f"Warning: rounding to {stored} changes logits by up to {found.of_merged:.3g}, "
                f"the adapter only by {found.of_adapter:.3g}: much of what it learned is lost. "
                "--dtype float32 keeps it."
            )
        return found


class _Rounded:
    """The weights of a model as a run on 4-bit weights saw them, tensor by tensor."""

    def __init__(self, base: Weights, rounding: Rounding, place: str) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self._base, self._rounding = base, rounding
        with torch.device("meta"):
            self._names = rounding.names(
                AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place))
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._base[name]
        return self._rounding(weight) if name in self._names else weight


def _part_tied(model: Any, adapter: Weights) -> None:
    """Give the head weights of its own if the adapter changes it or the embedding it shares."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    names = [n for n, m in model.named_modules() if m is head or m is embedding]
    if any(f".{name}." in f".{key}" for name in names for key in adapter.stored):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
        # What save_pretrained leaves out because it would be tied again on loading.
        model.all_tied_weights_keys = {}
