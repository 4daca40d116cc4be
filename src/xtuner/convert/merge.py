"""Merge an adapter into its base model, and verify the result.

    base files ──tensor by tensor, + scaling · B A──► shards ──reload──► same logits as
         └─ otherwise with PEFT, in memory ──────────────────┘           base + adapter?

The base is not quantized, even if the adapter was trained on a quantized one: merging into 4-bit
weights would round them again, which loses far more than the difference between the two bases.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from xtuner.convert import compare, lora
from xtuner.convert.output import copy_others, new_folder
from xtuner.convert.to_hf import find_checkpoint
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
from xtuner.errors import ModelError, shell_command
from xtuner.hub import fetch
from xtuner.hub.links import refuse_links_out
from xtuner.hub.sharing import public_name
from xtuner.models import manifest, original, vocabulary
from xtuner.models.adapter_config import read_adapter_config
from xtuner.models.adapters import load_adapter
from xtuner.models.families import internlm2
from xtuner.models.load import (
    load_tokenizer,
    located_config,
    meta_model,
    read_config,
    readable_errors,
)
from xtuner.models.quantize import Rounding
from xtuner.models.references import same_model
from xtuner.models.run_info import RunInfo
from xtuner.models.save import save_model
from xtuner.models.vision.folder import LLM_ADAPTER, run_of

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Log = Callable[[str], None]

_NOT_COPIED = (
    "*.safetensors", "*.bin", "*.index.json", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack",
    "*.onnx*", "README.md", "run.yaml", "adapter_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class MergeReport:
    """The verification of a merge.

    Attributes:
        max_difference: Largest logit difference from base + adapter; None if memory was
            insufficient to compare.
        relative: The same, relative to the largest logit.
        how: File by file, or with the model in memory.
    """

    max_difference: float | None
    relative: float | None
    how: Literal["shard by shard", "in memory"]


def merge(
    llm: str | Path,
    adapter: Path,
    save_dir: Path,
    *,
    max_shard_size: str = "2GB",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    log: Log = print,
) -> MergeReport:
    """Write the model `llm` with `adapter` merged into its weights to `save_dir`.

    Args:
        llm: The base model: a folder, a fetched model, or a hub name.
        adapter: A PEFT adapter: its folder, an ``iter_N``, or a work dir; for a LLaVA run, the
            adapter of the language model is merged.
        save_dir: A new folder.
        max_shard_size: Maximum size of a file, such as '2GB'.
        device: Where to merge.
        dtype: The dtype of the result; 'auto' is that of the base model's files.
        trust_remote_code: Run Python code that ships with the base model.
        log: Receives progress messages and warnings.

    Raises:
        ModelError: The adapter does not fit, or the result differs from base + adapter.
        LaunchError: `save_dir` is not empty, or the disk space is insufficient.
    """
    checkpoint = find_checkpoint(adapter)
    llm_adapter = checkpoint / LLM_ADAPTER
    chosen = pick_device(device)
    os.environ.setdefault("DS_ACCELERATOR", chosen)  # else DeepSpeed warns that it has to guess
    job = _Merge(
        llm=str(llm),
        adapter=llm_adapter if llm_adapter.is_dir() else checkpoint,
        max_bytes=parse_size(max_shard_size),
        device=chosen,
        dtype=DTYPES.get(dtype),
        trust_remote_code=trust_remote_code,
        log=log,
    )
    return job.run(save_dir)


@dataclass(frozen=True)
class _Merge:
    llm: str
    adapter: Path
    max_bytes: int
    device: str
    dtype: torch.dtype | None
    trust_remote_code: bool
    log: Log

    @property
    def folder(self) -> Path | None:
        """The folder of the base model, if it is on this machine."""
        folder = Path(self.llm).expanduser()
        return folder if folder.is_dir() else fetch.cached(self.llm)

    @cached_property
    def rounding(self) -> Rounding | None:
        """The quantization of the base weights during the training of the adapter."""
        info = run_of(self.adapter)
        return Rounding.of_run(info.settings, info.computed_in) if info else None

    @property
    def source(self) -> str:
        """The folder or hub name that the base model is loaded from."""
        return str(self.folder or self.llm)

    def run(self, save_dir: Path) -> MergeReport:
        """Merge, copy the other files, verify."""
        for folder in filter(None, (self.adapter, self.folder)):
            manifest.check(folder)
            refuse_links_out(folder)
        config = read_adapter_config(self.adapter)
        weights = Weights.of_adapter(self.adapter)
        info = self._run_info()
        if self.rounding:
            self.log(
                f"The adapter was trained on {self.rounding.quant_type} weights; merging it into "
                "the dequantized weights."
            )
        how: Literal["shard by shard", "in memory"] = "shard by shard"
        try:
            base, plan, changes = self._plan(weights, config)
        except lora.NeedsModel as reason:
            self.log(f"Merging with the model in memory: {reason}.")
            how, plan = "in memory", self._expected_plan()
        with new_folder(save_dir, num_bytes=total_bytes(plan)) as draft:
            if how == "shard by shard":
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
            return RunInfo(kind="model", base_model=public_name(base))
        if not same_model(info.base_model, self.llm):
            self.log(
                f"Warning: {self.adapter} was trained on {info.base_model}, "
                f"but is merged into {self.llm}."
            )
        merged = replace(info, kind="model", base_model=base, visual_encoder="")
        return merged.without_local_paths()

    def _plan(
        self, adapter: Weights, config: dict[str, Any]
    ) -> tuple[Weights, dict[str, Planned], dict[str, lora.Change]]:
        """The base weights, the tensors to write, and the changes to them."""
        if self.folder is None:
            raise lora.NeedsModel(f"{self.llm} is not a folder on this machine")
        try:
            base = Weights.of_model(self.folder, safetensors_only=True)
        except ModelError as error:
            raise lora.NeedsModel(str(error)) from error
        base_config = read_config(self.source)
        size = base_config.get("vocab_size")
        if isinstance(size, int) and (problem := vocabulary.misfit(self.adapter, size)):
            raise lora.NeedsModel(problem)
        changes = lora.changes(adapter, config, base.stored, base_config)
        if self.rounding and base_config.get("model_type") in internlm2.MODEL_TYPES:
            raise lora.NeedsModel("its files hold layers fused that were quantized one by one")
        sources = {n: base.stored[c.source] for n, c in changes.items()}
        return base, cast_plan({**base.stored, **sources}, self.dtype), changes

    def _expected_plan(self) -> dict[str, Planned]:
        """A plan with the size of the base model's files, for the disk check."""
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
        def weight(name: str) -> torch.Tensor:
            """A weight of the base model, quantized and dequantized as in the training run."""
            return self.rounding(base[name]) if self.rounding and name in rounded else base[name]

        def read(name: str) -> torch.Tensor:
            if name in changes:
                return changes[name].apply(weight, adapter, device=self.device)
            return weight(name)

        rounded: Collection[str] = ()
        if self.rounding:
            trust: Any = {"trust_remote_code": self.trust_remote_code}
            config = located_config(self.source, **trust)
            with readable_errors(self.source, "model"):
                rounded = self.rounding.names(meta_model(config, **trust))
        write_shards(draft, plan, read, max_bytes=self.max_bytes, log=self.log)
        assert self.folder is not None
        write_config(self.folder, draft, dtype=main_dtype(plan), untie=lora.HEAD in changes)

    def _merge_in_memory(self, draft: Path, config: dict[str, Any]) -> None:
        model = compare.load_plain(
            self.source, dtype=self._memory_dtype(), device=self.device,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip
        if self.rounding:
            self.rounding.apply(model)
        untied = not config.get("ensure_weight_tying") and _untie(
            model, Weights.of_adapter(self.adapter)
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie")
            adapted = load_adapter(model, self.adapter)
            try:
                merged = adapted.merge_and_unload().to(model.dtype)
            except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
                raise ModelError(
                    f"{self.adapter}: PEFT cannot merge this type of adapter: {error}; "
                    "use it unmerged: "
                    + shell_command("xtuner", "chat", self.llm, "--adapter", self.adapter)
                ) from error
        if untied:
            _tie_equal(merged)
        save_model(merged, draft, max_shard_size=f"{max(1, self.max_bytes // 1000)}KB")
        if self.folder is not None:
            original.keep_config(self.folder, draft)

    def _memory_dtype(self) -> torch.dtype:
        """The requested dtype, or the one in the base model's config.json."""
        config = read_config(self.source)
        name = str(config.get("dtype") or config.get("torch_dtype"))
        return self.dtype or DTYPES.get(name, torch.bfloat16)

    def _copy_others(self, draft: Path) -> None:
        """Copy the base model's other files; a tokenizer with added tokens is the adapter's."""
        has_tokenizer = (self.adapter / "tokenizer_config.json").is_file() and not (
            self.folder is not None and original.has_tokenizer_of(self.adapter, self.folder)
        )
        if has_tokenizer:
            copy_others(self.adapter, draft, only=original.TOKENIZER_FILES)
        if self.folder is not None:
            skip = (*_NOT_COPIED, *(original.TOKENIZER_FILES if has_tokenizer else ()))
            copy_others(self.folder, draft, skip=skip)
        elif not has_tokenizer:
            with contextlib.suppress(ModelError):  # the base model may have no tokenizer
                load_tokenizer(self.llm, trust_remote_code=self.trust_remote_code).save_pretrained(
                    str(draft)
                )

    def _check(self, draft: Path) -> compare.Difference | None:
        """Compare the written model with base + adapter.

        Raises:
            ModelError: They differ.
        """
        plan = cast_plan(Weights.of_model(draft).stored, None)
        stored = main_dtype(plan)
        parameters = sum(p.num_bytes // p.dtype.itemsize for p in plan.values())
        computed = compare.fitting_dtype(parameters, stored, device=self.device)
        if computed is None:
            self.log("Warning: not enough memory to load the model; the result was not verified.")
            return None
        self.log("Comparing the result with base + adapter ...")
        found = compare.compare(
            self.source, self.adapter, draft, dtype=computed, stored=stored, device=self.device,
            trust_remote_code=self.trust_remote_code, rounding=self.rounding,
        )  # fmt: skip
        if not math.isfinite(found.relative):
            raise ModelError(
                f"{self.llm} + {self.adapter}: the logits are not finite: weights are damaged, or "
                "a run diverged before they were saved. Nothing was written"
            )
        if found.is_wrong:
            raise ModelError(
                f"the merged model differs from {self.llm} + {self.adapter}: logits differ by up "
                f"to {found.of_merged:.3g}, {found.relative:.2%} of the largest logit; rounding to "
                f"{stored} explains {found.explained:.2%}. Nothing was written. "
                "Check that this is the model the adapter was trained on"
            )
        lost = found.of_merged > 0.5 * found.of_adapter > 0
        if found.relative > compare.NOTABLE:
            self.log(
                f"Warning: rounding to {stored} changes logits by up to {found.of_merged:.3g} "
                f"({found.relative:.2%} of the largest logit; the adapter changes them by up to "
                f"{found.of_adapter:.3g}). --dtype float32 avoids this."
            )
        elif lost:
            self.log(
                f"Warning: rounding to {stored} changes logits by up to {found.of_merged:.3g}, "
                f"the adapter only by {found.of_adapter:.3g}, so much of its effect is lost. "
                "--dtype float32 avoids this."
            )
        return found


def _untie(model: Any, adapter: Weights) -> bool:
    """Untie the head from the embedding if the adapter modifies one of them alone; return whether
    it did. Tokens that PEFT trains are those of both."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    names = [n for n, m in model.named_modules() if m is head or m is embedding]
    keys = [key for key in adapter.stored if ".token_adapter." not in key]
    if not any(f".{name}." in f".{key}" for name in names for key in keys):
        return False
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    return True


def _tie_equal(model: Any) -> None:
    """Tie the head to the embedding again if both got the same weights; otherwise save both."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
        model.config.tie_word_embeddings = True
    else:
        # save_pretrained omits tied weights, since loading ties them again.
        model.all_tied_weights_keys = {}
