"""Every setting: its name, type, default, range and meaning.

`Settings` is flat and frozen. Its bases are the parts of a settings file, in order; the
string under each field is what ``xtuner explain KEY`` prints and what the reference page is made
of. Values are checked one by one by pydantic and together by `check_combinations`, so that every
problem is reported at once. Nothing derived is stored: see the properties of `Settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from xtuner.types import IMAGE


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def one_as_tuple(value: Any) -> Any:
    """Let one text stand for a list of one."""
    return (value,) if isinstance(value, str) else _as_tuple(value)


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
OneOrMore = Annotated[tuple[str, ...], BeforeValidator(one_as_tuple)]
Floats = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]
Betas = Annotated[
    tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
    BeforeValidator(_as_tuple),
]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """One part of a settings file."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class ModelPart(Part):
    """PART 1  Model and method"""

    pretrained_model_name_or_path: str
    """The model to start from: a folder in Hugging Face format or a name on the hub. May also be
    written llm_name_or_path."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose authors you trust."""
    algorithm: str = "sft"
    """What is trained: 'sft' (instruction tuning: only what the assistant says is learnt),
    'pretrain' (every token is learnt), or your own as 'my_file.py:MyAlgorithm'."""
    tuning: Literal["full", "lora", "qlora"] = "qlora"
    """Which weights are trained: 'full' (all), 'lora' (small adapters beside frozen weights),
    'qlora' (adapters beside frozen weights held in 4 bits: the least memory)."""
    lora_r: Positive = 64
    """Rank of the adapters: higher learns more and takes more memory."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16
    """Scale of the adapters: their output is multiplied by lora_alpha / lora_r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapters' inputs set to zero in training. The QLoRA paper used 0.1 for 7B and
    13B models and 0.05 above; 0 is fastest."""
    lora_target_modules: OneOrMore = ("all-linear",)
    """Which layers get adapters: 'all-linear' (all linear layers but the output head), or names
    such as ['q_proj', 'v_proj']."""
    lora_modules_to_save: Strings = ()
    """Layers that are trained in full beside the adapters, such as ['embed_tokens', 'lm_head']."""
    quantization: Literal["auto", "none", "nf4", "fp4", "int8"] = "auto"
    """How frozen weights are held: 'auto' is 'nf4' with tuning = 'qlora' and 'none' otherwise."""
    double_quant: bool = True
    """Quantise the scales of 4-bit weights as well; saves about 0.4 bits a weight."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number type of the computation: 'auto' is bfloat16 where the hardware has it, else
    float32."""
    attn_implementation: str = "auto"
    """'auto' is xtuner's attention, which keeps packed samples apart; 'sdpa', 'eager' and
    'flash_attention_2' select transformers' own."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time. 'auto' does
    it only where the forecast says that the run would not fit otherwise."""
    embedding_on_cpu: Literal["auto"] | bool = "auto"
    """On a GPU, leave the input embedding in the CPU's memory and copy the rows that a step needs:
    less memory, the same numbers, 8 KiB to copy for a token of width 4,096. Needs adapters beside a
    model whose output head has weights of its own. 'auto' does it only where the forecast says that
    the run would not fit otherwise."""


class VisionPart(Part):
    """PART 1b  Pictures (LLaVA)"""

    visual_encoder_name_or_path: str | None = None
    """Gives the model eyes: a CLIP or SigLIP model, as a folder or a name on the hub. A projector
    of two layers joins it to the language model, and is trained."""
    pretrained_pth: str | None = None
    """The projector to start from: a checkpoint of a pretraining of the projector (iter_N, or what
    `xtuner convert pth_to_hf` made of it). None starts with a random one."""
    freeze_llm: bool = False
    """Do not train the language model's weights. With tuning = 'full' it is then left as it is;
    adapters are trained beside frozen weights anyway."""
    freeze_visual_encoder: bool = True
    """Do not train the visual encoder's weights; adapters may still be trained beside them."""
    visual_encoder_lora_r: Positive | None = None
    """Rank of adapters beside the visual encoder's linear layers; None makes none."""
    visual_encoder_lora_alpha: Annotated[float, Field(gt=0)] = 16
    """Scale of the visual encoder's adapters: alpha / r."""
    visual_encoder_lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the inputs of the visual encoder's adapters set to zero in training."""
    visual_select_layer: int = -2
    """The layer of the visual encoder whose output is used: -2 is the last but one."""
    data_root: str | None = None
    """A folder in which relative data_path, image_folder and evaluation_images are looked up
    first."""
    image_folder: str | None = None
    """The folder that names of pictures in the data are relative to; none may lie outside it. None
    is data_root, else the folder of the settings file."""
    pad_image_to_square: bool = True
    """Fill pictures up to a square with the mean colour; False cuts the middle out of long ones."""
    group_by_modality: bool = True
    """Put samples with pictures and without in packs or batches of their own and, without packing,
    those of like length together. Needs shuffle, and without packing a batch_size above 1."""
    cache_visual_features: bool = False
    """Keep what a frozen visual encoder makes of each picture on disk (in $XTUNER_CACHE or
    ~/.cache/xtuner), found again by the picture's content: later epochs skip the encoder. A picture
    of CLIP ViT-L/14-336 takes 1.2 MB."""


class DataPart(Part):
    """PART 2  Data"""

    data_path: OneOrMore
    """A json, jsonl, csv, parquet or txt file, a folder of them, a name on the hub, or a list of
    these."""
    dataset_format: OneOrMore = ("auto",)
    """How rows are read; 'auto' decides by the columns and says what it chose. One for all sources
    or a list, one a source. `xtuner list-dataset-format` shows all; your own is
    'my_format.py:to_messages'."""
    dataset_split: str = "train"
    """Which split of a data set on the hub."""
    data_repeats: Floats | None = None
    """How many times each source is used in an epoch: 2 is twice, 0.5 a random half (the same half
    each epoch). One number a source."""
    data_weights: Floats | None = None
    """Shares of the sources in the mix, one number a source: rows are repeated or left out so that
    an epoch has as many rows as all sources together. Excludes data_repeats."""
    max_dataset_length: Positive | None = None
    """Use at most this many rows, chosen at random by `seed`."""
    validation_ratio: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the rows set aside to measure the loss on; measured when the evaluation questions
    are asked."""
    prompt_template: str = "auto"
    """How messages become one text: 'auto' is the tokenizer's own chat template, which is right for
    every chat model; named ones serve base models; 'plain' adds nothing, and is what 'auto' means
    when a model without a chat template is pretrained. Your own is 'my_templates.py:MINE'."""
    SYSTEM: str = ""
    """System message for conversations that have none of their own."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Most tokens in one sample, and the length of a pack. With a visual encoder the tokens of one
    picture come on top, in every sample: 1472 and the 576 of CLIP ViT-L/14-336 make 2048."""
    pack_to_max_length: bool = True
    """Fill rows of max_length tokens with several samples that cannot see each other: faster, same
    result."""
    overlong: Literal["auto", "truncate", "drop", "error", "split"] = "auto"
    """What happens to a sample of more than max_length tokens: 'truncate' cuts its end, 'drop'
    leaves it out, 'error' stops, 'split' makes several of it (pretrain only). 'auto' is 'split' for
    pretrain, else 'truncate'. Every row cut or lost is counted and reported."""
    shuffle: bool = True
    """Draw the samples of each epoch in random order, fixed by `seed`."""
    dataloader_num_workers: Count = 0
    """Processes that prepare batches beside the training."""
    dataset_num_proc: Positive | None = None
    """Processes that turn text into tokens before the training; None is one a core, 8 at most."""


class OptimPart(Part):
    """PART 3  Schedule and optimizer"""

    batch_size: Positive = 1
    """Samples (or packs) a device works on at once."""
    accumulative_counts: Positive = 16
    """Batches whose gradients are added up before a step. Effective batch = batch_size *
    accumulative_counts * number of processes."""
    sequence_parallel_size: Positive = 1
    """Number of devices that share one sequence. Only 1 works in this version."""
    max_epochs: Positive = 3
    """How many times the data is gone through."""
    max_steps: Positive | None = None
    """Stop after this many optimizer steps, even within an epoch. None: max_epochs decides."""
    optim_type: str = "AdamW"
    """An optimizer of torch.optim by name ('AdamW', 'SGD', ...), or one of bitsandbytes:
    'AdamW8bit', 'PagedAdamW', 'PagedAdamW32bit', 'PagedAdamW8bit', 'Lion8bit', ..."""
    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Highest learning rate, reached after the warm-up."""
    betas: Betas = (0.9, 0.999)
    """The two decay rates of Adam-like optimizers."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay; not applied to biases and norms."""
    max_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm; None leaves them."""
    warmup_ratio: Fraction = 0.03
    """Share of all steps in which the learning rate rises linearly from near 0."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What the learning rate does after the warm-up: fall along a cosine to 0, along a line to 0,
    or stay."""
    seed: Count = 42
    """Fixes the order of the data, the adapters' first values and dropout: same seed, same run."""


class EvaluationPart(Part):
    """PART 4  Sample answers"""

    evaluation_inputs: OneOrMore = ()
    """Questions asked before, during and after training; the answers are shown and kept."""
    evaluation_images: OneOrMore = ()
    """Pictures that the questions are about: one for all questions, or one a question."""
    evaluation_freq: Positive = 500
    """Ask them every so many steps."""
    evaluation_max_new_tokens: Positive = 100
    """Longest answer, in tokens."""


class RuntimePart(Part):
    """PART 5  Runtime"""

    save_steps: Positive = 500
    """Save a checkpoint every so many steps; the end is always saved."""
    save_total_limit: Literal[-1] | Positive = 2
    """Keep at most this many checkpoints; -1 keeps all."""
    logging_steps: Positive = 1
    """Write a line of progress to the log every so many steps; scalars.jsonl has every step."""
    work_dir: str | None = None
    """Where results go; None is work_dirs/<name of the settings file>."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """'auto' is a GPU where there is one."""
    num_threads: Positive | None = None
    """CPU threads of the computation; None is one a physical core given to this process."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    custom_hooks: Strings = ()
    """Your own watchers of the run, each as 'my_file.py:MyHook'."""


PARTS: tuple[type[Part], ...] = (
    ModelPart,
    VisionPart,
    DataPart,
    OptimPart,
    EvaluationPart,
    RuntimePart,
)


class Settings(ModelPart, VisionPart, DataPart, OptimPart, EvaluationPart, RuntimePart):
    """All settings of one run, checked and frozen."""

    @property
    def uses_adapter(self) -> bool:
        """Whether adapters are trained, rather than all weights."""
        return self.tuning != "full"

    @property
    def sees(self) -> bool:
        """Whether the model has a visual encoder."""
        return self.visual_encoder_name_or_path is not None

    @property
    def llm_training(self) -> Literal["frozen", "adapter", "full"]:
        """What of the language model is trained."""
        if self.uses_adapter:
            return "adapter"
        return "frozen" if self.sees and self.freeze_llm else "full"

    @property
    def visual_encoder_training(self) -> Literal["frozen", "adapter", "full"]:
        """What of the visual encoder is trained."""
        if self.visual_encoder_lora_r is not None:
            return "adapter"
        return "frozen" if self.freeze_visual_encoder else "full"

    @property
    def effective_quantization(self) -> Literal["none", "nf4", "fp4", "int8"]:
        """`quantization` with 'auto' resolved."""
        if self.quantization == "auto":
            return "nf4" if self.tuning == "qlora" else "none"
        return self.quantization

    @property
    def embedding_may_leave(self) -> bool:
        """Whether the input embedding may stay in the CPU's memory, as far as settings tell."""
        return self.uses_adapter and not self.sees

    @property
    def effective_overlong(self) -> Literal["truncate", "drop", "error", "split"]:
        """`overlong` with 'auto' resolved."""
        if self.overlong == "auto":
            return "split" if self.algorithm == "pretrain" else "truncate"
        return self.overlong

    def without_effect(self) -> list[str]:
        """Settings that were given and that the others leave without effect."""
        idle: list[str] = []
        if not self.uses_adapter:
            idle += [name for name in ModelPart.model_fields if name.startswith("lora_")]
        if self.effective_quantization not in ("nf4", "fp4"):
            idle.append("double_quant")
        if not self.evaluation_inputs:
            idle += ["evaluation_max_new_tokens", "evaluation_images"]
        if not self.sees:
            shared = ("visual_encoder_name_or_path", "data_root")
            idle += [name for name in VisionPart.model_fields if name not in shared]
            idle.append("evaluation_images")
        elif self.visual_encoder_lora_r is None:
            idle += ["visual_encoder_lora_alpha", "visual_encoder_lora_dropout"]
        if self.sees and not (self.shuffle and (self.pack_to_max_length or self.batch_size > 1)):
            idle.append("group_by_modality")
        return [name for name in idle if name in self.model_fields_set]


ALIASES = {"llm_name_or_path": "pretrained_model_name_or_path"}
"""Other names that settings may be written under."""


def field_parts() -> dict[str, type[Part]]:
    """The part that each setting belongs to, in the order of a settings file."""
    return {name: part for part in PARTS for name in part.model_fields}


Check = Callable[["Settings"], Iterator[tuple[str, str]]]


def check_combinations(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield (setting, problem) for every combination that cannot work."""
    for check in CHECKS:
        yield from check(settings)


def _check_quantization(s: Settings) -> Iterator[tuple[str, str]]:
    if s.llm_training == "full" and s.effective_quantization != "none":
        yield (
            "quantization",
            "quantised weights cannot be trained in full; "
            "set tuning = 'qlora' or quantization = 'none'",
        )
    if s.tuning == "lora" and s.effective_quantization != "none":
        yield (
            "quantization",
            "adapters beside quantised weights are tuning = 'qlora'; or set quantization = 'none'",
        )
    if s.tuning == "qlora" and s.quantization == "none":
        yield (
            "quantization",
            "tuning = 'qlora' needs quantised weights; "
            "set tuning = 'lora' or quantization = 'auto'",
        )


def _check_embedding_on_cpu(s: Settings) -> Iterator[tuple[str, str]]:
    if s.embedding_on_cpu is True and not s.embedding_may_leave:
        yield (
            "embedding_on_cpu",
            "is for tuning = 'lora' or 'qlora' without a visual encoder; set it to 'auto'",
        )


def _check_vision(s: Settings) -> Iterator[tuple[str, str]]:
    if not s.sees:
        if s.freeze_llm:
            yield (
                "freeze_llm",
                "nothing would be trained; it is for runs with visual_encoder_name_or_path",
            )
        return
    if IMAGE in s.SYSTEM:
        yield "SYSTEM", f"has {IMAGE} in it; pictures belong to the questions in the data"
    if s.algorithm == "pretrain":
        yield (
            "algorithm",
            "'pretrain' is for plain text; to train the projector alone, set algorithm = 'sft' and "
            "freeze_llm = True",
        )
    if s.visual_encoder_lora_r is not None and not s.freeze_visual_encoder:
        yield (
            "visual_encoder_lora_r",
            "adapters are trained beside frozen weights; set freeze_visual_encoder = True, or "
            "visual_encoder_lora_r = None",
        )
    if s.cache_visual_features and s.visual_encoder_training != "frozen":
        yield (
            "cache_visual_features",
            "the visual encoder is trained, so its features change; set it to False",
        )


def _check_evaluation_images(s: Settings) -> Iterator[tuple[str, str]]:
    images, questions = len(s.evaluation_images), len(s.evaluation_inputs)
    if images > 1 and images != questions:
        yield (
            "evaluation_images",
            f"has {images} entries for {questions} evaluation_inputs; give one, or one a question",
        )


def _check_lora_modules_to_save(s: Settings) -> Iterator[tuple[str, str]]:
    if s.sees and s.lora_modules_to_save:
        yield (
            "lora_modules_to_save",
            "does not work beside a visual encoder; leave it out",
        )


def _check_sequence_parallel(s: Settings) -> Iterator[tuple[str, str]]:
    if s.sequence_parallel_size != 1:
        yield (
            "sequence_parallel_size",
            "sharing a sequence between devices does not work in this version; set it to 1",
        )


def _check_data_path(s: Settings) -> Iterator[tuple[str, str]]:
    if not s.data_path or not all(s.data_path):
        yield "data_path", "names no data"


def _check_dataset_format(s: Settings) -> Iterator[tuple[str, str]]:
    formats, sources = len(s.dataset_format), len(s.data_path)
    if formats not in (1, sources):
        yield (
            "dataset_format",
            f"has {formats} entries, but data_path has {sources}; give one, or one a source",
        )


def _check_one_mix(s: Settings) -> Iterator[tuple[str, str]]:
    if s.data_repeats is not None and s.data_weights is not None:
        yield "data_weights", "excludes data_repeats; keep one of the two"


def _check_shares(name: str, s: Settings) -> Iterator[tuple[str, str]]:
    values: tuple[float, ...] | None = getattr(s, name)
    if values is None:
        return
    sources = len(s.data_path)
    if len(values) != sources:
        yield name, f"has {len(values)} entries, but data_path has {sources}; give one a source"
    if any(v < 0 for v in values) or not any(values):
        yield name, "numbers must be 0 or more, and one of them above 0"


def _check_overlong(s: Settings) -> Iterator[tuple[str, str]]:
    if s.overlong == "split" and s.algorithm == "sft":
        yield (
            "overlong",
            "'split' would part a question from its answer; it is for algorithm = 'pretrain'",
        )


CHECKS: tuple[Check, ...] = (
    _check_quantization,
    _check_embedding_on_cpu,
    _check_vision,
    _check_evaluation_images,
    _check_lora_modules_to_save,
    _check_sequence_parallel,
    _check_data_path,
    _check_dataset_format,
    _check_one_mix,
    partial(_check_shares, "data_repeats"),
    partial(_check_shares, "data_weights"),
    _check_overlong,
)
"""What `check_combinations` runs; each can be run alone when other settings are wrong."""
