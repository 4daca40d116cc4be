"""Refuses models that would load but compute wrong results. Some have weights that Llama's
architecture lacks; others come with their own code, which transformers 5 runs with uninitialized
buffers (transformers issue 48892).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xtuner.errors import ModelError, first_line

_XCOMPOSER = (
    "InternLM-XComposer adapts its language model to images with additional weights (PLoRA), "
    "which xtuner does not support. For images, train LLaVA on internlm2_chat: `xtuner list-cfg "
    "-p llava`"
)
_INTERNVL = "InternVL is not supported. For images, train LLaVA: `xtuner list-cfg -p llava`"
_TYPES = {
    "internlmxcomposer": _XCOMPOSER,
    "internlmxcomposer2": _XCOMPOSER,
    "internlm_xcomposer2": _XCOMPOSER,
    "internvl_chat": _INTERNVL,
}
_CLASSES = {
    "InternLM2ForRewardModel": "a reward model has no output head, so it cannot generate text. "
    "Give the chat model, such as internlm/internlm2-chat-1_8b",
    "InternLM2ForSequenceClassification": "a classifier has no output head, so it cannot generate "
    "text. Give the chat model, such as internlm/internlm2-chat-1_8b",
}


def check_supported(path: str, config: Mapping[str, Any]) -> None:
    """Refuse a model by its config.json.

    Raises:
        ModelError: Says what the model is and what to use instead.
    """
    kind = str(config.get("model_type", "")).lower().replace("-", "")
    named = config.get("architectures")
    classes = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    reason = _TYPES.get(kind) or next((_CLASSES[c] for c in classes if c in _CLASSES), None)
    if reason:
        raise ModelError(f"{path} ({', '.join(classes) or kind}): {reason}")


@torch.no_grad()
def check_remote_code(path: str, model: Any) -> None:
    """Refuse a remote-code model with uninitialized buffers. Its rotary frequencies must start at 1
    and decrease, and its logits on a few tokens must be finite. Models with transformers' own code
    are not tested.

    Raises:
        ModelError: They are wrong.
    """
    if not type(model).__module__.startswith("transformers_modules"):
        return
    frequencies = [(n, b) for n, b in model.named_buffers() if n.endswith("inv_freq")]
    wrong = next((name for name, buffer in frequencies if not _is_decreasing(buffer)), None)
    problem = f"its rotary frequencies ({wrong}) hold arbitrary values" if wrong else ""
    if not problem:
        size = model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(8, device=model.device)[None] % size
        try:
            finite = bool(model(input_ids=ids, use_cache=False).logits.isfinite().all())
        except Exception as error:  # remote code can raise anything
            problem = f"a forward pass fails: {first_line(error)}"
        else:
            problem = "" if finite else "its logits are not finite"
    if problem:
        raise ModelError(
            f"{path}: {problem}. Its code was written for transformers 4, which initializes "
            f"buffers while it loads a model; transformers 5 does not. Use a release of this "
            f"model that transformers supports natively, or its original trainer"
        )


def _is_decreasing(frequencies: torch.Tensor) -> bool:
    values = frequencies.float().flatten()
    falling = bool((values[1:] <= values[:-1]).all())
    return bool(values.isfinite().all()) and falling and 0 < float(values[0]) <= 1.001
