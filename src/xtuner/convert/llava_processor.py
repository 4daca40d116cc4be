"""The processor, chat template and stop tokens of a LLaVA model for plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from xtuner.data.images.expansion import expand
from xtuner.errors import ModelError
from xtuner.models.load import quiet_transformers
from xtuner.models.vision.load import VisionLanguageModel
from xtuner.models.vision.tower import strategy_of
from xtuner.templates.base import Template
from xtuner.types import IMAGE, Message

Log = Callable[[str], None]


def set_stop_tokens(model: Any, tokenizer: Any, template: Template, log: Log) -> None:
    """Make ``generate`` end answers at the same tokens as xtuner chat."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    ends = dict.fromkeys(i for i in (*template.stop_token_ids, *declared) if i is not None)
    model.generation_config.eos_token_id = list(ends)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    words = [w for w in template.stop_words[:1] if len(_ids(tokenizer, w)) != 1]
    if words:
        log(
            f"Note: answers also end at the string {' or '.join(map(repr, words))}, which is not a "
            f"single token. In plain transformers, use model.generate(..., stop_strings={words!r}, "
            "tokenizer=processor.tokenizer)."
        )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def save_processor(
    image_model: VisionLanguageModel, tokenizer: Any, chat_template: str, folder: Path
) -> None:
    """Write tokenizer, image processor and chat template as one LlavaProcessor."""
    from transformers import LlavaProcessor

    vision = image_model.model.config.vision_config
    upstream = getattr(image_model.processor, "upstream", None)
    if upstream is None:
        raise ModelError("the image processor of this model cannot be saved")
    tokenizer.chat_template = chat_template
    _disable_special_tokens(tokenizer)
    processor = LlavaProcessor(
        image_processor=upstream,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy_of(vision),
        chat_template=chat_template,
        image_token=IMAGE,
        num_additional_image_tokens=int(strategy_of(vision) == "default"),
    )
    with quiet_transformers():
        processor.save_pretrained(str(folder))
        upstream.save_pretrained(str(folder))
    (folder / "chat_template.json").unlink(missing_ok=True)


def _disable_special_tokens(tokenizer: Any) -> None:
    """Stop `tokenizer` from adding BOS and EOS: the chat template writes them, so
    ``processor(text=...)`` would add them twice, or where training had none."""
    for name in ("add_bos_token", "add_eos_token"):
        if getattr(tokenizer, name, False):
            setattr(tokenizer, name, False)
    if tokenizer.is_fast and list(tokenizer("a")["input_ids"]) != _ids(tokenizer, "a"):
        tokenizer.backend_tokenizer.post_processor = None


def compare_prompts(
    folder: Path, image_model: VisionLanguageModel, template: Template, log: Log
) -> None:
    """Load the saved processor, and warn if its prompt differs from that of xtuner chat."""
    from PIL import Image
    from transformers import AutoProcessor

    with quiet_transformers():
        processor = AutoProcessor.from_pretrained(str(folder))
    question = "What is it?"
    ids = template.prompt_ids([Message("user", f"{IMAGE}\n{question}")])
    image = Image.new("RGB", (32, 32))
    token_id, tokens = image_model.image_token_id, image_model.processor.num_tokens(image.size)
    expected, _ = expand(ids, token_id, [tokens] * ids.count(token_id))
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    actual = processor(text=text, images=image)["input_ids"][0]
    if list(actual) != expected:
        log(
            f"Warning: the saved processor encodes a test question differently from xtuner chat "
            f"({len(actual)} and {len(expected)} tokens), so answers in plain transformers may "
            "differ."
        )
