"""The settings, grouped into the parts of a settings file.

``xtuner explain KEY`` and docs/settings.md show the string under a field; its `Mark` tells the rest
of xtuner how to treat it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from xtuner.config.marks import (
    AboveZero,
    Betas,
    Count,
    Dropout,
    Floats,
    Fraction,
    Mark,
    Names,
    Nested,
    OneOrMore,
    Options,
    Positive,
    Strings,
)


def _no_adapter(s: Any) -> bool:
    return not s.uses_adapter


def _text_only(s: Any) -> bool:
    return not s.has_vision


def _no_vision_adapter(s: Any) -> bool:
    return not s.has_vision or s.visual_encoder_lora_r is None


def _not_packed(s: Any) -> bool:
    return s.pack_to_max_length is False


def _not_paged(s: Any) -> bool:
    return not s.optim_type.startswith("Paged")


def _no_best(s: Any) -> bool:
    return not s.keep_best and s.early_stopping_patience is None


def _no_questions(s: Any) -> bool:
    return not s.evaluation_inputs


def _no_image_questions(s: Any) -> bool:
    return not s.has_vision or not s.evaluation_inputs


def _cannot_group(s: Any) -> bool:
    return not (s.has_vision and s.shuffle and (s.packs or s.batch_size > 1))


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

    pretrained_model_name_or_path: Annotated[
        str, Mark("fixed", is_path=True, comment="a folder, or a name on the hub")
    ]
    """The model to start from: a folder in Hugging Face format or a name on the hub. Can also be
    written as llm_name_or_path."""
    trust_remote_code: Annotated[bool, Mark("free")] = False
    """Run Python code that ships with the model. Only for models whose authors you trust; needs
    --trust-remote-code on the command line as well, once per model and machine."""
    algorithm: Annotated[str, Mark("fixed")] = "sft"
    """The training objective: 'sft' (instruction tuning: the loss covers what the assistant says),
    'pretrain' (the loss covers every token), or your own as 'my_file.py:MyAlgorithm'."""
    algorithm_options: Annotated[Options, Mark("fixed")] = ()
    """Settings of the algorithm itself, by name, such as {'beta': 0.1}. 'sft' and 'pretrain' have
    none."""
    tuning: Annotated[
        Literal["full", "lora", "qlora"],
        Mark("fixed", comment="'full', 'lora' or 'qlora' (4-bit, least memory)"),
    ] = "qlora"
    """Which weights are trained: 'full' (all), 'lora' (small adapters on frozen weights), 'qlora'
    (adapters on frozen 4-bit weights: the least memory)."""
    lora_r: Annotated[
        Positive, Mark("fixed", comment="rank: capacity of the adapters", idle=_no_adapter)
    ] = 64
    """Rank of the adapters. A higher rank has more capacity and takes more memory."""
    lora_alpha: Annotated[
        Literal["auto"] | AboveZero,
        Mark(comment="adapters are scaled by lora_alpha / lora_r", idle=_no_adapter),
    ] = "auto"
    """Scale of the adapters: their output is multiplied by lora_alpha / lora_r. 'auto' is 16 times
    the square root of lora_r, the scale of rank-stabilized LoRA (arXiv:2312.03732): 2 for rank 64,
    4 for rank 16."""
    lora_dropout: Annotated[Dropout, Mark(comment="", idle=_no_adapter)] = 0.0
    """Dropout on the input of the adapters. The QLoRA paper uses 0.1 for 7B and 13B models and 0.05
    for larger ones; 0 is fastest."""
    lora_target_modules: Annotated[OneOrMore, Mark("fixed", idle=_no_adapter)] = ("all-linear",)
    """Layers that get adapters: 'all-linear' (all linear layers except the output head), or names
    such as ['q_proj', 'v_proj']."""
    lora_modules_to_save: Annotated[OneOrMore, Mark("fixed", idle=_no_adapter)] = ()
    """Layers that are fully trained in addition to the adapters, such as ['embed_tokens',
    'lm_head']."""
    lora_config: Annotated[Nested, Mark("fixed", idle=_no_adapter)] = ()
    """Further fields of PEFT's LoraConfig, by name: {'use_rslora': True} scales adapters by
    lora_alpha / sqrt(lora_r), {'use_dora': True} trains their magnitudes (DoRA),
    {'init_lora_weights': 'pissa'} starts from the principal parts of the weights. A note says if
    fields disable xtuner's own forward pass of adapters, which is faster."""
    loraplus_lr_ratio: Annotated[AboveZero | None, Mark("fixed", idle=_no_adapter)] = None
    """LoRA+: the learning rate of the second matrix of each adapter (B) is this times lr; 16 is
    usual. None trains both alike."""
    resize_embeddings: Annotated[bool, Mark("fixed")] = False
    """Give the model an embedding and an output row for every token of its tokenizer that has none.
    The new rows start as the mean of the others, and are trained, with adapters too; checkpoints,
    chat and merge have them. Without it, rows with such tokens are refused."""
    quantization: Annotated[Literal["auto", "none", "nf4", "fp4", "int8"], Mark("fixed")] = "auto"
    """How frozen weights are stored: 'auto' is 'nf4' with tuning = 'qlora' and 'none' otherwise."""
    double_quant: Annotated[
        bool, Mark("fixed", idle=lambda s: s.effective_quantization not in ("nf4", "fp4"))
    ] = True
    """Also quantize the scales of 4-bit weights; saves about 0.4 bits per weight."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the computation: 'auto' is bfloat16 where the hardware supports it, float16 on
    other GPUs, and float32 on other CPUs. float16 takes as much memory as bfloat16; the loss is
    scaled so that its gradients do not underflow."""
    attn_implementation: Annotated[str, Mark("free")] = "auto"
    """'auto' is xtuner's attention, which isolates packed samples; 'sdpa', 'eager' and
    'flash_attention_2' select those of transformers."""
    gradient_checkpointing: Annotated[Literal["auto"] | bool, Mark("free")] = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time. 'auto' does
    so only if the run would not fit otherwise, according to the forecast."""
    embedding_on_cpu: Annotated[Literal["auto"] | bool, Mark("free")] = "auto"
    """On a GPU, keep the input embedding in CPU memory and copy the rows that a step needs: less
    memory, the same numbers, 8 KiB copied per token of width 4,096. Requires adapters and a model
    whose output head has its own weights. 'auto' does so only if the run would not fit otherwise,
    according to the forecast."""
    cuda_graphs: Annotated[Literal["auto"] | bool, Mark("free")] = "auto"
    """On an NVIDIA GPU, record the decoder's forward and backward pass once as graphs and replay
    them: two to three times as fast where the GPU waits for the CPU (small models, 4-bit weights,
    fast cards). Only for packed rows. 'auto' does so where the forecast has room for gradients
    during a forward pass, and only if the graphs give the same numbers; True ends the run if they
    cannot be used."""


class VisionPart(Part):
    """PART 1b  Images (LLaVA)"""

    visual_encoder_name_or_path: Annotated[str | None, Mark("fixed", is_path=True)] = None
    """Adds image input: a CLIP or SigLIP model, as a folder or a name on the hub. A projector of
    two layers connects it to the language model and is trained."""
    pretrained_pth: Annotated[str | None, Mark("free", is_path=True, idle=_text_only)] = None
    """The projector to start from: a checkpoint of a projector pretraining (iter_N, or the output
    of `xtuner convert pth_to_hf`). None starts from random values."""
    freeze_llm: Annotated[bool, Mark("fixed", idle=_text_only)] = False
    """Do not train the weights of the language model. With tuning = 'full' it is left unchanged;
    with adapters its weights are frozen anyway."""
    freeze_visual_encoder: Annotated[bool, Mark("fixed", idle=_text_only)] = True
    """Do not train the weights of the vision tower; adapters on it can still be trained."""
    visual_encoder_lora_r: Annotated[Positive | None, Mark("fixed", idle=_text_only)] = None
    """Rank of adapters on the linear layers of the vision tower; None adds none."""
    visual_encoder_lora_alpha: Annotated[AboveZero, Mark(idle=_no_vision_adapter)] = 16
    """Scale of the adapters of the vision tower: alpha / r."""
    visual_encoder_lora_dropout: Annotated[Dropout, Mark(idle=_no_vision_adapter)] = 0.0
    """Dropout on the input of the adapters of the vision tower."""
    visual_select_layer: Annotated[int, Mark("fixed", idle=_text_only)] = -2
    """The layer of the vision tower whose output is used: -2 is the second to last."""
    data_root: Annotated[str | None, Mark("free", is_path=True)] = None
    """A folder in which relative data_path, image_folder and evaluation_images are looked up
    first."""
    image_folder: Annotated[str | None, Mark(idle=_text_only)] = None
    """The folder to which image names in the data are relative; images outside it are rejected.
    None is data_root if set, otherwise the folder of the settings file."""
    pad_image_to_square: Annotated[bool, Mark(idle=_text_only)] = True
    """Pad images to a square with the mean color; False crops the center of elongated ones."""
    group_by_modality: Annotated[bool, Mark(idle=_cannot_group)] = True
    """Put samples with and without images into separate packs or batches and, without packing,
    samples of similar length together. Requires shuffle and, without packing, a batch_size above
    1."""
    cache_visual_features: Annotated[bool, Mark("free", idle=_text_only)] = False
    """Store the features of a frozen vision tower on disk (in $XTUNER_CACHE or ~/.cache/xtuner),
    keyed by the content of each image: later epochs skip the tower. An image takes 1.2 MB with CLIP
    ViT-L/14-336."""


class DataPart(Part):
    """PART 2  Data"""

    data_path: Annotated[
        OneOrMore,
        Mark(is_path=True, comment="a file, a folder, a name on the hub, or a list of these"),
    ]
    """A json, jsonl, csv, tsv, parquet, arrow or txt file, a folder of them or of `save_to_disk`, a
    name on the hub, or a list of these."""
    dataset_format: Annotated[
        OneOrMore,
        Mark("free", comment="'auto' detects it; one for all sources, or a list"),
    ] = ("auto",)
    """How rows are read; 'auto' detects the format by the columns and reports its choice. One for
    all sources or a list with one per source. `xtuner list-dataset-format` lists them; your own is
    'my_format.py:to_messages'."""
    columns: Annotated[Names, Mark("free")] = ()
    """The roles of the columns, such as {'问题': 'user', '回答': 'assistant'}: 'user',
    'assistant', 'system', or a column that a format reads. Common names are recognized without
    it."""
    dataset_split: Annotated[str, Mark("free")] = "train"
    """The split to use of a data set on the hub."""
    data_repeats: Floats | None = None
    """How often each source is used per epoch: 2 means twice, 0.5 a random half (the same half in
    every epoch). One number per source."""
    data_weights: Floats | None = None
    """Shares of the sources in the mix, one number per source: rows are repeated or left out so
    that an epoch has as many rows as all sources together. Cannot be combined with
    data_repeats."""
    max_dataset_length: Positive | None = None
    """Use at most this many rows, drawn at random with `seed`."""
    validation_ratio: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the rows held out to measure the validation loss, whenever the evaluation questions
    are asked."""
    validation_path: Annotated[OneOrMore, Mark(is_path=True)] = ()
    """Rows to measure the validation loss on, instead of a share of the training data: a file, a
    folder, a name on the hub, or a list of these."""
    prompt_template: Annotated[
        str, Mark(comment="'auto' is the chat template of the tokenizer")
    ] = "auto"
    """How messages are rendered to text: 'auto' uses the tokenizer's own chat template; named
    templates are for base models; 'plain' adds nothing, and is what 'auto' selects to pretrain a
    model without a chat template. Your own is 'my_templates.py:MINE'."""
    tool_call_errors: Literal["drop", "keep"] = "drop"
    """What happens to a row whose tool calls are wrong: arguments that are not JSON or do not fit
    the schema of their tool, a tool that the row does not declare, a result without a call. 'drop'
    discards the row and reports it, 'keep' trains on it."""
    thoughts: Literal["learn", "mask", "remove"] = "learn"
    """What happens to the thoughts of the assistant, which are its reasoning and the text before a
    tool call: 'learn' supervises them, 'mask' excludes them from the loss, 'remove' removes
    them."""
    SYSTEM: Annotated[str, Mark(comment="system message for conversations without one")] = ""
    """System message for conversations that have none."""
    max_length: Annotated[
        int, Field(ge=8), Mark(comment="maximum tokens per sample, and length of a pack")
    ] = 2048
    """Maximum tokens per sample, and the length of a pack. With a vision tower the tokens of one
    image are added to it: 1472 plus 576 for CLIP ViT-L/14-336 make 2048."""
    pack_to_max_length: Annotated[
        Literal["auto"] | bool,
        Mark(comment="several samples per row, isolated: faster, same result"),
    ] = "auto"
    """Fill rows of max_length tokens with several samples that cannot attend to each other: faster,
    same result. 'auto' packs for every model that can isolate samples; others (Mamba, linear
    attention, models outside transformers' attention interface such as Falcon) process one sample
    at a time."""
    pack_length: Annotated[Literal["auto"] | Positive, Mark(idle=_not_packed)] = "auto"
    """Tokens of a pack, at most max_length. 'auto' is max_length; with few rows and
    accumulative_counts = 'auto' it is less, so that an epoch has 128 packs, but at least 4 samples
    per pack, and thus enough optimizer steps."""
    overlong: Literal["auto", "truncate", "drop", "error", "split"] = "auto"
    """What happens to a sample of more than max_length tokens: 'truncate' cuts its end, 'drop'
    removes it, 'error' stops, 'split' makes several samples of it (pretrain only). 'auto' is
    'split' for pretrain, otherwise 'truncate'. Every row that is cut or lost is counted and
    reported."""
    max_lost_rows: Annotated[Fraction, Mark("free")] = 0.05
    """Share of the rows of a source that may be unusable (no answer, a column missing, an image
    that cannot be read, ...); above it training does not start, and the reasons are listed. Rows
    that overlong = 'drop' removes do not count. 1 accepts any."""
    shuffle: bool = True
    """Draw the samples of each epoch in random order, fixed by `seed`."""
    dataloader_num_workers: Annotated[
        Count, Mark("free", comment="processes that prepare batches")
    ] = 0
    """Processes that prepare batches during training."""
    dataset_num_proc: Annotated[Positive | None, Mark("free")] = None
    """Processes that tokenize the data before training; None is one per core, up to 8."""


class OptimPart(Part):
    """PART 3  Schedule and optimizer"""

    batch_size: Annotated[Positive, Mark(comment="per device")] = 1
    """Samples (or packs) per device and micro-batch."""
    accumulative_counts: Annotated[
        Literal["auto"] | Positive, Mark(comment="micro-batches per optimizer step")
    ] = "auto"
    """Micro-batches whose gradients are summed for one optimizer step. Effective batch = batch_size
    * accumulative_counts * number of processes / sequence_parallel_size. 'auto' is 1 to 16: as many
    as leave at least 128 steps per epoch."""
    sequence_parallel_size: Annotated[Positive, Mark("free")] = 1
    """Processes that share the tokens of each row (sequence parallelism, Ulysses): activations take
    about this many times less memory in each process. The number of processes must be a multiple of
    it; the processes of a group count once in the effective batch."""
    max_epochs: Annotated[
        Literal["auto"] | Positive, Mark(comment="passes over the data; 'auto': by number of rows")
    ] = "auto"
    """Passes over the data. 'auto' is 15 for up to 1,000 rows, 3 from 10,000, and 1 for more rows
    if an epoch has 1,000 optimizer steps. Equal rows count once, and their repetitions as passes:
    2,000 copies of one row are read once."""
    max_steps: Annotated[
        Positive | None, Mark(comment="stop after this many steps; None: after max_epochs")
    ] = None
    """Stop after this many optimizer steps, even within an epoch. None: after max_epochs."""
    steps_are: Annotated[Literal["optimizer_steps", "micro_batches"], Mark("fixed")] = (
        "optimizer_steps"
    )
    """What max_steps, save_steps, evaluation_freq, logging_steps and the names of checkpoints
    count: 'optimizer_steps', or as in XTuner 0.x 'micro_batches' of one process, of which
    accumulative_counts make a step. iter_300 then holds the last step completed by 300."""
    optim_type: Annotated[
        str, Mark("fixed", comment="from torch.optim, or 'PagedAdamW32bit', 'AdamW8bit', ...")
    ] = "AdamW"
    """An optimizer of torch.optim by name ('AdamW', 'SGD', ...), or one of bitsandbytes:
    'AdamW8bit', 'PagedAdamW', 'PagedAdamW32bit', 'PagedAdamW8bit', 'Lion8bit', ... 'Muon' takes
    AdamW for embeddings, the output head, norms and biases."""
    paged_optimizer: Annotated[Literal["auto"] | bool, Mark("free", idle=_not_paged)] = "auto"
    """On a GPU, let the state of a paged optimizer ('PagedAdamW32bit', ...) move to CPU memory when
    GPU memory is short. 'auto' does so only if the run would not fit otherwise, according to the
    forecast, and before recomputing activations; the arithmetic is the same."""
    lr: Annotated[AboveZero, Mark(comment="")] = 2e-4
    """Peak learning rate, reached after the warm-up."""
    betas: Annotated[Betas, Mark(comment="")] = (0.9, 0.999)
    """The two decay rates of Adam-like optimizers."""
    weight_decay: Annotated[float, Field(ge=0), Mark(comment="")] = 0.0
    """Weight decay; not applied to biases and norms."""
    max_norm: Annotated[AboveZero | None, Mark(comment="gradients are clipped to this norm")] = 1.0
    """Gradients are clipped to this norm; None does not clip."""
    warmup_ratio: Annotated[
        Fraction,
        Mark(
            comment="share of the steps in which lr rises",
            idle=lambda s: s.warmup_steps is not None,
        ),
    ] = 0.03
    """Share of all steps in which the learning rate rises linearly from near 0."""
    warmup_steps: Count | None = None
    """Length of the warm-up in steps; replaces warmup_ratio."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The learning rate after the warm-up: falls along a cosine, falls linearly, or stays
    constant."""
    lr_end_ratio: Annotated[Fraction, Mark(idle=lambda s: s.lr_schedule == "constant")] = 0.0
    """The learning rate at the end, as a share of lr: 0.1 ends at a tenth of it."""
    neftune_noise_alpha: AboveZero | None = None
    """NEFTune: noise on the input embeddings of training, uniform within
    alpha / sqrt(length * width) for a sample of that length; 5 is usual. None adds none."""
    seed: Count = 42
    """Determines the order of the data, the initial adapters and dropout: same seed, same run."""


class EvaluationPart(Part):
    """PART 4  Sample answers"""

    evaluation_inputs: Annotated[
        OneOrMore, Mark("free", comment="asked before, during and after training")
    ] = ()
    """Questions asked before, during and after training; the answers are shown and saved."""
    evaluation_images: Annotated[OneOrMore, Mark("free", idle=_no_image_questions)] = ()
    """Images that the questions are about: one for all questions, or one per question. Files, or
    URLs, which are fetched once."""
    evaluation_freq: Annotated[Positive, Mark("free", comment="in {steps}")] = 500
    """Ask them every this many steps."""
    evaluation_max_new_tokens: Annotated[Positive, Mark("free", idle=_no_questions)] = 100
    """Maximum length of an answer, in tokens."""
    evaluation_system: Annotated[str | None, Mark("free", idle=_no_questions)] = None
    """System message of these questions; None is SYSTEM."""
    evaluation_rows: Annotated[Count, Mark("free", idle=lambda s: s.has_vision)] = 8
    """At the end, ask questions from this many rows of the training data and half as many of the
    validation split, and three everyday questions, and report how many answers are reproduced or
    unchanged; 0 asks none."""
    evaluation_stop_words: Annotated[Strings, Mark("free", idle=_no_questions)] = ()
    """Strings that end these answers, in addition to those of the template."""


class RuntimePart(Part):
    """PART 5  Runtime"""

    save_steps: Annotated[
        Positive, Mark("free", comment="in {steps}; the last step is always saved")
    ] = 500
    """Save a checkpoint every this many steps; the last step is always saved."""
    save_epochs: Annotated[Positive | None, Mark("free")] = None
    """Also save a checkpoint at the end of every this many epochs."""
    keep_best: Annotated[bool, Mark("free")] = False
    """Save a checkpoint whenever `best_metric` improves, keep it, and write its name to the file
    `best_checkpoint` in the work dir."""
    early_stopping_patience: Annotated[Positive | None, Mark("free")] = None
    """End the run after this many measurements of `best_metric` without an improvement."""
    best_metric: Annotated[str, Mark("free", idle=_no_best)] = "val_loss"
    """What `keep_best` and `early_stopping_patience` compare: 'val_loss', which is measured every
    evaluation_freq steps, or a scalar that one of your hooks adds."""
    best_metric_goal: Annotated[Literal["min", "max"], Mark("free", idle=_no_best)] = "min"
    """Whether a lower or a higher `best_metric` is better."""
    save_total_limit: Annotated[
        Literal[-1] | Positive, Mark("free", comment="checkpoints to keep; -1 keeps all")
    ] = 2
    """Keep at most this many checkpoints; -1 keeps all."""
    logging_steps: Annotated[Positive, Mark("free")] = 1
    """Write a line of progress to the log every this many steps; scalars.jsonl has every step."""
    work_dir: Annotated[str | None, Mark("free")] = None
    """Folder for results. None is work_dirs/<name of the settings file>."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Mark("free")] = "auto"
    """'auto' is a GPU if there is one."""
    strategy: str = "replicated"
    """How several processes share weights, gradients and optimizer state: 'replicated' (each holds
    all of them and takes different rows; gradients are summed), 'fsdp2', 'deepspeed_zero1',
    'deepspeed_zero2', 'deepspeed_zero2_offload', 'deepspeed_zero3', 'deepspeed_zero3_offload', a
    DeepSpeed configuration as 'my_file.json', or your own as 'my_file.py:MyStrategy'."""
    strategy_options: Options = ()
    """Settings of the strategy itself, by name: for 'fsdp2' {'cpu_offload': True} keeps weights,
    gradients and optimizer state in CPU memory."""
    hang_timeout: Annotated[Literal["auto"] | Positive, Mark("free", comment="in seconds")] = "auto"
    """Seconds without progress in any process, after which the run reports where each process is.
    It then ends, unless one of them prepares the run, compiles, evaluates, writes a checkpoint or
    runs a hook. 'auto': within an optimizer step 10 times what its slowest part has taken so far,
    at least 45; elsewhere 600."""
    num_threads: Annotated[Positive | None, Mark("free")] = None
    """CPU threads of the computation; None is one per physical core of this process."""
    tensorboard: Annotated[bool, Mark("free")] = True
    """Write TensorBoard events."""
    report_to: Annotated[OneOrMore, Mark("free")] = ()
    """Experiment trackers to which every scalar is sent: 'tensorboard', 'wandb', 'mlflow',
    'swanlab', 'trackio', or a list of these. Each needs its package: pip install
    'xtuner[wandb]'."""
    report_project: Annotated[str, Mark("free", idle=lambda s: not s.report_to)] = "xtuner"
    """The project or experiment in the trackers of `report_to`; runs are named after their work
    dirs."""
    push_to_hub: Annotated[str | None, Mark("free")] = None
    """Upload the result to the hub after training, as 'owner/name', without optimizer state and
    local paths. With keep_best it is the best checkpoint."""
    hub_private_repo: Annotated[bool, Mark("free", idle=lambda s: s.push_to_hub is None)] = True
    """Whether a repository that `push_to_hub` creates is private."""
    custom_hooks: Annotated[Strings, Mark("free")] = ()
    """Your own hooks, each as 'my_file.py:MyHook'."""
