"""`xtuner convert pth_to_hf | merge | split`."""

from __future__ import annotations

import contextlib
import functools
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xtuner.cli import _model, _output, _settings
from xtuner.errors import ConfigError, shell_command

if TYPE_CHECKING:
    from xtuner.config.schema import Settings

app = typer.Typer(help="Convert checkpoints to models for other tools.", no_args_is_help=True)

Size = Annotated[
    str, typer.Option(metavar="SIZE", help="Maximum size of a weight file, such as 2GB or 500MB.")
]


class SaveFormat(StrEnum):
    """Output formats of a LLaVA model."""

    xtuner = "xtuner"
    huggingface = "huggingface"


@app.command("pth_to_hf")
def pth_to_hf(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="The settings of the run: a file or a built-in name."
        ),
    ],
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="work_dirs/.../iter_N (iter_N.pth works too), or a work dir (its newest "
            "checkpoint).",
        ),
    ],
    save_dir: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the result.")],
    fp32: Annotated[
        bool, typer.Option("--fp32", help="Save in float32 instead of 16 bits.")
    ] = False,
    max_shard_size: Size = "2GB",
    save_format: Annotated[
        SaveFormat,
        typer.Option(
            help="For a LLaVA model: its trained parts (xtuner), or one model for transformers "
            "(huggingface)."
        ),
    ] = SaveFormat.xtuner,
    overrides: _settings.Overrides = None,
    trust_remote_code: _settings.TrustRemoteCode = False,
    trust_code: _model.TrustCode = False,
) -> None:
    """Convert a checkpoint to an adapter or model.

    The result is a PEFT adapter or, if all weights were trained, a Hugging Face model. Tokenizer
    and run.yaml are kept, so that chat and merge find the base model and the template. Training
    state is left out.
    """
    save_dir = save_dir.expanduser()
    settings = _settings.load_any(
        config, overrides=overrides, trust_remote_code=trust_remote_code, trust_code=True
    ).settings
    with contextlib.ExitStack() as stack:
        from xtuner.hub import old_pth

        if old_pth.is_old(checkpoint):
            from xtuner.convert.old_checkpoint import as_folder

            checkpoint = stack.enter_context(as_folder(checkpoint, settings, beside=save_dir))
        _convert(
            settings, checkpoint, save_dir, save_format, config=config, fp32=fp32,
            max_shard_size=max_shard_size, trust_code=trust_code,
        )  # fmt: skip


def _convert(
    settings: Settings,
    checkpoint: Path,
    save_dir: Path,
    save_format: SaveFormat,
    *,
    config: str,
    fp32: bool,
    max_shard_size: str,
    trust_code: bool,
) -> None:
    base = settings.pretrained_model_name_or_path

    from xtuner.convert.to_hf import find_checkpoint, to_hf
    from xtuner.models.references import same_model
    from xtuner.models.vision.folder import is_llava_folder

    source = find_checkpoint(checkpoint)
    if is_llava_folder(source):
        _write_llava(
            settings, source, save_dir, save_format, fp32=fp32, max_shard_size=max_shard_size,
            trust_code=trust_code,
        )  # fmt: skip
        return
    if save_format is not SaveFormat.xtuner:
        raise ConfigError(
            f"--save-format {save_format}: {source} is not a LLaVA model (it has no projector)"
        )
    info = to_hf(checkpoint, save_dir, fp32=fp32, max_shard_size=max_shard_size)
    if info is not None and not same_model(info.base_model, base):
        _output.echo(
            f"Warning: {config} names the model {base}, but the checkpoint was trained on "
            f"{info.base_model}; chat and merge will use the latter.",
            err=True,
        )
    _output.echo(f"Wrote {save_dir}.")
    if (save_dir / "adapter_config.json").is_file():
        if info is not None and Path(info.base_model).is_absolute():
            _output.echo(
                f"The adapter names its base model by its folder on this machine, "
                f"{info.base_model}. To share it, write the model's name on the hub into "
                "adapter_config.json and run.yaml.",
                err=True,
            )
        model = info.base_model if info is not None else base
        merged = save_dir.with_name(f"{save_dir.absolute().name}_merged")
        _next("xtuner", "convert", "merge", model, str(save_dir), str(merged))
    else:
        _next("xtuner", "chat", str(save_dir))


def _write_llava(
    settings: Settings,
    source: Path,
    save_dir: Path,
    save_format: SaveFormat,
    *,
    fp32: bool,
    max_shard_size: str,
    trust_code: bool,
) -> None:
    from xtuner.convert import llava

    llm, encoder = llava.models_of(
        source,
        llm=settings.pretrained_model_name_or_path,
        visual_encoder=settings.visual_encoder_name_or_path or "",
        log=functools.partial(_output.echo, err=True),
    )
    if save_format is SaveFormat.xtuner:
        llava.write_parts(source, save_dir, fp32=fp32, max_shard_size=max_shard_size)
    else:
        llava.write_model(
            source, save_dir, llm=llm, visual_encoder=encoder, fp32=fp32,
            max_shard_size=max_shard_size, trust_remote_code=settings.trust_remote_code,
            trust_code=trust_code, log=_output.echo,
        )  # fmt: skip
    _output.echo(f"Wrote {save_dir}: {', '.join(sorted(p.name for p in save_dir.iterdir()))}")
    complete = save_format is SaveFormat.huggingface or (save_dir / "run.yaml").is_file()
    parts = () if complete else ("--visual-encoder", encoder, "--llava", str(save_dir))
    _next("xtuner", "chat", str(save_dir) if complete else llm, *parts, "--image", "FILE")


@app.command("merge")
def merge(
    llm: Annotated[
        str,
        typer.Argument(
            metavar="LLM", help="The base model: a folder, or a name as in a settings file."
        ),
    ],
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER", help="An adapter: the output of pth_to_hf, an iter_N, or a work dir."
        ),
    ],
    save_dir: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new folder for the merged model.")
    ],
    max_shard_size: Size = "2GB",
    device: _model.DeviceOption = _model.Device.auto,
    dtype: Annotated[
        _model.Dtype,
        typer.Option(help="Number type of the result; 'auto' is that of the base model."),
    ] = _model.Dtype.auto,
    trust_remote_code: _model.TrustRemoteCode = False,
    is_clip: Annotated[
        bool, typer.Option("--is-clip", help="The model is a vision tower (CLIP or SigLIP).")
    ] = False,
) -> None:
    """Merge an adapter into its base model.

    The result is verified against base + adapter. The base model is read unquantized, even if the
    adapter was trained with QLoRA: merging into 4-bit weights would round them again. Weights are
    merged file by file, which takes little memory; the verification loads the model.
    """
    save_dir = save_dir.expanduser()
    if is_clip:
        from xtuner.convert.vision_tower import merge_encoder

        difference = merge_encoder(llm, adapter, save_dir, dtype=dtype.value, device=device.value)
        _output.echo(f"Wrote {save_dir}. Largest difference before rounding: {difference:.1e}.")
        return
    from xtuner.convert.merge import merge as run

    report = run(
        llm, adapter, save_dir, max_shard_size=max_shard_size, device=device.value,
        dtype=dtype.value, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    _output.echo(f"Wrote {save_dir}, merged {report.how}.")
    if report.max_difference is not None and report.relative is not None:
        _output.echo(
            f"Largest logit difference from base + adapter: {report.max_difference:.3g} "
            f"({report.relative:.3%} of the largest logit)."
        )
    _next("xtuner", "chat", str(save_dir))


@app.command("split")
def split(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A model folder.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="A new folder.")],
    max_shard_size: Size = "2GB",
) -> None:
    """Re-shard a model.

    Writes weight files of another size; the tensors do not change.
    """
    from xtuner.convert.split import split as run

    dst = dst.expanduser()
    run(src.expanduser(), dst, max_shard_size=max_shard_size)
    _output.echo(f"Wrote {dst}; every tensor was read back and is identical.")
    _next("xtuner", "chat", str(dst))


def _next(*words: str) -> None:
    typer.echo(f"Next:\n  {shell_command(*words)}")
