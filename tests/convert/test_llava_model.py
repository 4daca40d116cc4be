"""A complete LLaVA model from parts, in plain transformers."""

import pytest
import torch
from parts_maker import answer, write_parts_of
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from xtuner.cli.app import main
from xtuner.convert.llava import write_model
from xtuner.data.images.files import open_image
from xtuner.errors import ModelError
from xtuner.testing.tiny import CHATML_TEMPLATE, tiny_model, tiny_tokenizer
from xtuner.testing.vision import tiny_images, tiny_vision_tower_folder

STOP = 4  # <|im_end|>
QUESTION = "Which number is this?"


def llm_folder(folder, *, eos="</s>", adds_bos=False, chat_template=CHATML_TEMPLATE, **options):
    """A language model whose tokenizer has the end token `eos`, and may put BOS before texts."""
    model = tiny_model(initializer_range=0.2, **options)
    tokenizer = tiny_tokenizer(chat_template=chat_template)
    tokenizer.eos_token = eos
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
        assert tokenizer("a")["input_ids"][0] == 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(tmp_path):
    return tiny_vision_tower_folder(tmp_path / "clip", initializer_range=0.5)


def plain(folder):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def asked(image):
    return [
        {
            "role": "user",
            "content": [{"type": "image", "path": image}, {"type": "text", "text": QUESTION}],
        }
    ]


def test_plain_transformers_stops_where_our_chat_does(tmp_path, encoder):
    llm = llm_folder(tmp_path / "llm")
    parts = write_parts_of(tmp_path / "parts", llm, encoder, prompt_template="chatml")
    write_model(parts, tmp_path / "model", fp32=True)
    model, processor = plain(tmp_path / "model")
    (image,) = tiny_images(tmp_path, 1)
    inputs = processor(
        images=open_image(str(tmp_path / image)),
        text=processor.apply_chat_template(asked(image), add_generation_prompt=True),
        return_tensors="pt",
    )
    size = inputs["input_ids"].shape[1]

    def stop_third(ids, scores):
        wanted = STOP if ids.shape[1] == size + 2 else 70
        return torch.full_like(scores, -9.0).index_fill(1, torch.tensor([wanted]), 9.0)

    found = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, logits_processor=[stop_third]
    )
    assert found[0, size:].tolist() == [70, 70, STOP]
    assert set(model.generation_config.eos_token_id) == {2, STOP}


WITH_BOS = "{{ bos_token }}" + CHATML_TEMPLATE


@pytest.mark.parametrize(
    ("template", "chat_template"), [("chatml", CHATML_TEMPLATE), ("auto", WITH_BOS)]
)
def test_tokenizer_that_adds_bos_gives_the_ids_of_xtuner_chat(
    tmp_path, encoder, template, chat_template
):
    llm = llm_folder(tmp_path / "llm", adds_bos=True, chat_template=chat_template)
    parts = write_parts_of(tmp_path / "parts", llm, encoder, prompt_template=template)
    said = []
    write_model(parts, tmp_path / "model", fp32=True, log=said.append)
    assert not [line for line in said if "Warning" in line]
    image = str(tmp_path / tiny_images(tmp_path, 1)[0])
    wanted = answer(parts, QUESTION, image)
    assert answer(tmp_path / "model", QUESTION, image) == wanted
    model, processor = plain(tmp_path / "model")
    text = processor.apply_chat_template(asked(image), add_generation_prompt=True)
    two_ways = (
        processor(images=open_image(image), text=text, return_tensors="pt"),
        processor.apply_chat_template(
            asked(image), add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        ),
    )  # fmt: skip
    for inputs in two_ways:
        ids = inputs["input_ids"][0].tolist()
        assert ids.count(1) == (template == "auto")
        found = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, len(ids) :]
        text_found = processor.tokenizer.decode(found, skip_special_tokens=True)
        assert text_found.rstrip("\ufffd") == wanted  # half a character, cut off by the limit


def test_a_head_with_a_bias_is_refused(tmp_path, encoder):
    """transformers' LLaVA has a head without bias, and would ignore it silently."""
    llm = llm_folder(tmp_path / "llm", model_type="phi")
    parts = write_parts_of(tmp_path / "parts", llm, encoder, prompt_template="chatml")
    write_model(parts, tmp_path / "zero")  # a bias of zeros is equivalent to none
    plain(tmp_path / "zero")
    model = AutoModelForCausalLM.from_pretrained(llm)
    model.lm_head.bias.data[70] = 1.0
    model.save_pretrained(llm)
    with pytest.raises(ModelError, match="bias"):
        write_model(parts, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_processor_with_different_tokens_is_warned_about(tmp_path, encoder, monkeypatch):
    llm = llm_folder(tmp_path / "llm", adds_bos=True)
    parts = write_parts_of(tmp_path / "parts", llm, encoder, prompt_template="chatml")
    monkeypatch.setattr(
        "xtuner.convert.llava_processor._disable_special_tokens", lambda tokenizer: None
    )
    said = []
    write_model(parts, tmp_path / "model", log=said.append)
    (line,) = [line for line in said if "Warning" in line]
    assert "plain transformers" in line


SETTINGS = """
llm_name_or_path = {llm!r}
visual_encoder_name_or_path = {encoder!r}
data_path = "data.json"
image_folder = "."
tuning = "full"
freeze_llm = True
"""


def convert(folder, parts, *, llm, encoder):
    (folder / "config.py").write_text(SETTINGS.format(llm=str(llm), encoder=str(encoder)))
    command = ["convert", "pth_to_hf", str(folder / "config.py"), str(parts), str(folder / "model")]
    return main([*command, "--fp32", "--save-format", "huggingface"])


def test_the_checkpoint_knows_its_models_better_than_the_settings(tmp_path, encoder, capsys):
    llm, other = llm_folder(tmp_path / "llm"), llm_folder(tmp_path / "other", seed=7)
    parts = write_parts_of(tmp_path / "parts", llm, encoder, prompt_template="chatml")
    assert convert(tmp_path, parts, llm=other, encoder="clip") == 0  # from another folder
    err = capsys.readouterr().err
    assert f"the language model {other}, but the checkpoint was trained on {llm}" in err
    image = str(tmp_path / tiny_images(tmp_path, 1)[0])
    assert answer(tmp_path / "model", QUESTION, image) == answer(parts, QUESTION, image)


def test_models_that_moved_are_taken_from_the_settings(tmp_path, encoder, capsys):
    llm = llm_folder(tmp_path / "llm")
    parts = write_parts_of(tmp_path / "parts", llm, encoder, prompt_template="chatml")
    moved = llm.rename(tmp_path / "moved")
    assert convert(tmp_path, parts, llm=moved, encoder=encoder) == 0
    assert f"no longer exists; using {moved}" in capsys.readouterr().err
