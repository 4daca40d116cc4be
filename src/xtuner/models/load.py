"""Loads a tokenizer or a model from a folder or the hub, in a given dtype, quantized or not.

    name ──families──► Auto classes know it ──from_pretrained──► checked: nothing missing ──► model

transformers initializes weights that a checkpoint lacks randomly and only warns; here that is an
error.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from xtuner import plugins
from xtuner.device.heap import trim_if_grown
from xtuner.errors import ModelError, XTunerError, count, in_one_line, listed
from xtuner.hub import fetch
from xtuner.hub.json_files import read_object
from xtuner.kernels.four_bit import fix_4bit_layers
from xtuner.models import sentencepiece
from xtuner.models.quantize import Quantization, quantization_config
from xtuner.models.unsupported import check_remote_code, check_supported

# PEFT 0.21 reads a property that transformers 5.23 renamed; the note is for its authors, not for
# users.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
# bitsandbytes looks for an optional kernel package when it is imported, and reports its absence as
# a failure.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# With 8-bit weights it reports at every layer and step that inputs are cast.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of the model at `path` (a folder, a hub name, or a name that was fetched).

    Raises:
        ModelError: It does not exist or cannot be read.
    """
    with _known(path, "tokenizer") as source, quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        sentencepiece.correct(tokenizer, source)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    quantization: Quantization = "none",
    double_quant: bool = True,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load the causal language model at `path` (a folder, a hub name, or a name that was fetched).

    Args:
        dtype: The dtype of the computation and of weights that are not quantized.
        device: 'cpu' or 'cuda'.
        quantization: How linear layers are quantized.
        double_quant: Also quantize the scales of 4-bit weights.
        trust_remote_code: Run Python code that is stored with the weights.
        attn_implementation: A name in transformers' attention interface; None lets transformers
            choose.

    Raises:
        ModelError: The model does not exist, cannot be read, or lacks weights.
    """
    options: dict[str, Any] = {}
    if quantization != "none":
        options["quantization_config"] = quantization_config(
            quantization, double_quant=double_quant, compute_dtype=dtype
        )
        options["device_map"] = {"": device}
    with _known(path, "model") as source, quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **options,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        headline = (
            f"{path}: {count(len(missing), 'weight is', 'weights are')} missing from the "
            f"checkpoint and would be random"
        )
        raise ModelError(listed(headline, [*missing[:8], *(["..."] if len(missing) > 8 else [])]))
    fix_4bit_layers(model)
    model = model if quantization != "none" else model.to(device)
    check_remote_code(str(path), model)
    trim_if_grown()
    return model


def located_config(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of the model at `path`, without its weights.

    Raises:
        ModelError: It does not exist or cannot be read.
    """
    with _known(path, "model") as source:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)


def meta_model(
    config: Any,
    *,
    dtype: torch.dtype | None = None,
    num_layers: int | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Create the causal language model of a configuration on the meta device.

    Args:
        config: The result of `located_config`; it is not changed.
        dtype: The dtype of the weights; None uses the configuration's.
        num_layers: Number of decoder layers, instead of the configuration's.
        trust_remote_code: Run Python code that is stored with the configuration.
    """
    config = copy.deepcopy(config)
    if num_layers is not None:
        text = config.get_text_config()
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == text.num_hidden_layers:
                setattr(text, name, value[:num_layers])
        text.num_hidden_layers = num_layers
    options = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"), quiet_transformers():
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, **options
        )


def located(path: str | Path) -> str:
    """Return a folder unchanged, a hub name's fetched copy if there is one, otherwise the hub name.

    Raises:
        ModelError: `path` is none of these and the hub does not respond. It is asked once, with a
            short timeout: transformers itself would retry for most of a minute.
    """
    name = str(path)
    if Path(path).is_dir():
        return name
    if fetched := fetch.cached(name):
        return str(fetched)
    if problem := fetch.unreachable(name):
        raise ModelError(
            f"{name}: no such folder, not fetched with `xtuner fetch`, and not available from the "
            f"hub: {problem}.\n  Hint: give a folder that holds config.json "
            "and *.safetensors, or check the name and the network"
        )
    return name


def cache_key(path: str | Path) -> tuple[str, int, int]:
    """What `path` refers to now, as a key for caches: the folder, and the time and size of its
    config.json; for a hub name, the name."""
    file = Path(path).resolve() / "config.json"
    if not file.is_file():
        return str(path), 0, 0
    stat = file.stat()
    return str(file.parent), stat.st_mtime_ns, stat.st_size


def lasting_name(path: str | Path) -> str:
    """The name of a model that is valid in any working directory: a folder's absolute path,
    otherwise the name itself."""
    return str(Path(path).resolve()) if Path(path).is_dir() else str(path)


def read_config(source: str) -> dict[str, Any]:
    """The model's ``config.json`` as a dict; empty if it is not available."""
    file: str | Path | None = Path(source) / "config.json"
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            file = hf_hub_download(source, "config.json")
        except Exception:  # every failure is reported with its reason when the model is loaded
            return {}
    return read_object(Path(str(file)))


def register_family(source: str) -> None:
    """Register the architecture of `source` with transformers if an xtuner family supports it."""
    model_type = read_config(source).get("model_type")
    package = "xtuner.models.families"
    for name in plugins.names(package):
        family = importlib.import_module(f"{package}.{name}")
        if model_type in family.MODEL_TYPES:
            family.register()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars and notes while loading; errors are still shown."""
    logger = transformers.logging
    level, bars = logger.get_verbosity(), logger.is_progress_bar_enabled()
    logger.set_verbosity(logging.ERROR)
    logger.disable_progress_bar()
    try:
        yield
    finally:
        logger.set_verbosity(level)
        if bars:
            logger.enable_progress_bar()


@contextlib.contextmanager
def _known(path: str | Path, what: str) -> Iterator[str]:
    """Locate the model at `path`; before its code runs, check that it is supported, and register
    its architecture. config.json may hold anything."""
    source = located(path)
    with readable_errors(path, what):
        check_supported(str(path), read_config(source))
        register_family(source)
        yield source


@contextlib.contextmanager
def readable_errors(path: str | Path, what: str) -> Iterator[None]:
    """Turn errors in loading `what` from `path` into a ModelError in plain words."""
    try:
        yield
    except (torch.OutOfMemoryError, XTunerError):
        raise
    except Exception as error:  # damaged files cause errors that libraries do not check for
        words = in_one_line(error, plain=(OSError, ValueError, ImportError, RuntimeError))
        if "trust_remote_code=True" in words:
            raise ModelError(
                f"the {what} {str(path)!r} comes with Python code of its own, which is not run. If "
                f"you trust its authors, add --trust-remote-code"
            ) from error
        where = Path(path).resolve() if Path(path).exists() else f"no folder {path!s}, and the hub"
        hints = (
            "give a folder that holds config.json and *.safetensors, a name on the hub, "
            "or fetch it once with `xtuner fetch`"
        )
        raise ModelError(
            f"cannot load the {what} {str(path)!r} ({where}): {words}\n  Hint: {hints}."
        ) from error
