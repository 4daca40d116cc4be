"""The second exercise of the course through the command line, on tiny models: a projector, then
adapters on both sides, then conversion and a chat about an image."""

import base64
import io
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xtuner.chat.opening import open_chat
from xtuner.chat.session import Session
from xtuner.chat.terminal import Terminal
from xtuner.cli.app import main
from xtuner.data.images.files import open_image
from xtuner.errors import ConfigError, DataError, XTunerError
from xtuner.generation.generate import GenerationOptions
from xtuner.generation.images import question
from xtuner.models.vision.llava import LlavaEmbedder
from xtuner.testing.tiny import tiny_model_folder
from xtuner.testing.vision import tiny_llava_data, tiny_vision_tower_folder
from xtuner.types import Message

SHARED = """
llm_name_or_path = "model"
visual_encoder_name_or_path = "clip"
data_path = "data.json"
image_folder = "images"
prompt_template = "chatml"
max_length = 96
accumulative_counts = 1
save_steps = 4
evaluation_freq = 4
evaluation_inputs = ["Which number is this?"]
evaluation_images = "images/0.png"
evaluation_max_new_tokens = 4
lr = 1e-2
dtype = "float32"
"""
PRETRAIN = SHARED + 'tuning = "full"\nfreeze_llm = True\nmax_steps = 4\nmax_epochs = 9\n'
FINETUNE = SHARED + (
    'tuning = "lora"\nlora_r = 4\nlora_alpha = 16\nvisual_encoder_lora_r = 2\n'
    'pretrained_pth = "pretrain/iter_4"\n'
    "max_steps = 8\nmax_epochs = 9\n"
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XTUNER_CACHE", str(folder / "cache"))
        tiny_model_folder(folder / "model", initializer_range=0.2)
        tiny_vision_tower_folder(folder / "clip", initializer_range=0.5)
        tiny_llava_data(folder / "data.json", folder / "images", count=12)
        for name, text in (("pretrain", PRETRAIN), ("finetune", FINETUNE)):
            (folder / f"{name}.py").write_text(text, encoding="utf-8")
            assert main(["train", f"{name}.py", "--work-dir", name]) == 0
        yield folder


@pytest.fixture(autouse=True)
def inside(workshop, monkeypatch):
    monkeypatch.chdir(workshop)


def answer(model, image="images/5.png", **options):
    options.setdefault("dtype", "float32")
    session = open_chat(
        str(model), options=GenerationOptions(max_new_tokens=8, temperature=0), **options
    )
    return "".join(session.ask("Which number is this?", [image]))


def answering(name):
    """The fine-tuned model as one complete model, made once."""
    if not (model := Path(name)).exists():
        command = ["convert", "pth_to_hf", "finetune.py", "finetune/iter_8.pth", name, "--fp32"]
        assert main([*command, "--save-format", "huggingface"]) == 0
    return model


def names(folder):
    return {p.name for p in folder.iterdir()}


def test_a_checkpoint_holds_what_was_trained(workshop):
    first, second = workshop / "pretrain" / "iter_4", workshop / "finetune" / "iter_8"
    assert {"projector", "run.yaml"} <= names(first)
    assert not {"llm_adapter", "llm", "visual_encoder"} & names(first)
    assert {"projector", "llm_adapter", "visual_encoder_adapter"} <= names(second)
    weights = list(first.rglob("*.safetensors"))
    assert [p.parent.name for p in weights] == ["projector"]
    (log_dir,) = [p for p in (workshop / "finetune").iterdir() if p.name[0].isdigit()]
    assert (log_dir / "eval_outputs_iter_8.txt").is_file()


def test_resumed_run_ends_like_an_uninterrupted_one(workshop):
    (workshop / "resumed.py").write_text(FINETUNE, encoding="utf-8")
    assert main(["train", "resumed.py", "--work-dir", "resumed"]) == 0
    assert main(["train", "resumed.py", "--work-dir", "resumed", "--resume", "iter_4"]) == 0
    for file in ("projector/model.safetensors", "llm_adapter/adapter_model.safetensors"):
        one, two = (workshop / w / "iter_8" / file for w in ("finetune", "resumed"))
        assert one.read_bytes() == two.read_bytes()


def test_complete_model_answers_the_same_in_plain_transformers(workshop):
    whole = answering("whole")
    wanted = answer("finetune/iter_8")
    assert answer(whole) == wanted
    assert plain_answer(whole, "images/5.png") == wanted


def plain_answer(whole, image):
    """What plain transformers answers."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(whole, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(whole)
    parts = [{"type": "image"}, {"type": "text", "text": "Which number is this?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    inputs = processor(images=open_image(image), text=text, return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    ids = found[0, inputs["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(ids, skip_special_tokens=True)
    return str(text).rstrip("\ufffd")  # half a character, cut off by the limit


def test_four_bit_run_converts_to_a_model_with_the_same_answers(workshop):
    text = FINETUNE.replace('"lora"', '"qlora"')
    (workshop / "four.py").write_text(text, encoding="utf-8")
    assert main(["train", "four.py", "--work-dir", "four"]) == 0
    command = ["convert", "pth_to_hf", "four.py", "four", "four_whole", "--fp32"]
    assert main([*command, "--save-format", "huggingface"]) == 0
    assert answer("four_whole") == answer("four")


def test_parts_are_kept_as_parts(workshop):
    assert main(["convert", "pth_to_hf", "finetune.py", "finetune", "parts", "--fp32"]) == 0
    assert {"projector", "llm_adapter", "visual_encoder_adapter"} <= names(workshop / "parts")
    assert not (workshop / "parts" / "training_state.pt").exists()
    assert answer("parts") == answer("finetune")
    assert answer("model", visual_encoder="clip", llava="parts") == answer("finetune")


def write_old_parts(old, ours, *, pickled):
    """The parts in `ours` as xtuner 0.1 wrote them: its projector was a plain list of layers, and
    encoders had a level ``vision_model``."""
    renames = {
        "projector/model.safetensors": {"linear_1": "model.0", "linear_2": "model.2"},
        "llm_adapter/adapter_model.safetensors": {},
        "visual_encoder_adapter/adapter_model.safetensors": {
            "base_model.model.": "base_model.model.vision_model."
        },
    }
    for name, pairs in renames.items():
        tensors = load_file(str(ours / name))
        for new, former in pairs.items():
            tensors = {key.replace(new, former, 1): t for key, t in tensors.items()}
        file = old / name
        file.parent.mkdir(parents=True)
        config = ours / file.parent.name / "adapter_config.json"
        if config.is_file():
            text = config.read_text()
            if "visual" in name:
                text = text.replace('"encoder.', '"vision_model.encoder.')
                assert "vision_model.encoder." in text
            (file.parent / "adapter_config.json").write_text(text)
        if pickled:
            stem = "pytorch_model" if file.stem == "model" else file.stem
            torch.save(tensors, file.with_name(f"{stem}.bin"))
        else:
            save_file(tensors, str(file))
    return old


def test_both_stages_as_documented(workshop, tmp_path, monkeypatch, capsys):
    """copy-cfg, train, copy-cfg, train: the second finds the work dir of the first."""
    document = (Path(__file__).parents[2] / "docs" / "llava.md").read_text(encoding="utf-8")
    block = document.split("## The two stages")[1].split("\n\n")[1]
    commands = [shlex.split(line)[1:] for line in block.splitlines()]
    assert [words[0] for words in commands] == ["copy-cfg", "train"] * 2
    monkeypatch.chdir(tmp_path)
    ours = {
        "pretrained_model_name_or_path": workshop / "model",
        "visual_encoder_name_or_path": workshop / "clip",
        "data_root": workshop, "data_path": "data.json", "image_folder": "images",
        "prompt_template": "chatml", "max_steps": 1, "batch_size": 2, "lora_r": 4,
        "evaluation_inputs": "[]",
    }  # fmt: skip
    sets = [word for name, value in ours.items() for word in ("--set", f"{name}={value}")]
    for words in commands:
        assert main([*words, *(sets if words[0] == "train" else [])]) == 0, capsys.readouterr().err
    (first, second) = sorted(Path("work_dirs").iterdir(), key=lambda p: "finetune" in p.name)
    assert (first / "last_checkpoint").exists() and (second / "last_checkpoint").exists()
    capsys.readouterr()
    away = first.rename(Path("work_dirs/first_stage"))
    assert main([*commands[-1], *sets, "--work-dir", "again"]) == 2
    assert f"these have a projector: '{away}'" in capsys.readouterr().err


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_parts_of_xtuner_0_1_answer_the_same(workshop, tmp_path, capsys, pickled):
    old = write_old_parts(tmp_path / "old", workshop / "finetune" / "iter_8", pickled=pickled)
    parts = tmp_path / "parts"
    assert answer("model", visual_encoder="clip", llava=old) == answer("finetune")
    assert main(["convert", "pth_to_hf", "finetune.py", str(old), str(parts), "--fp32"]) == 0
    assert f"xtuner chat model --visual-encoder clip --llava {parts} " in capsys.readouterr().out
    assert not list(parts.rglob("*.bin")) and len(list(parts.rglob("*.safetensors"))) == 3
    assert answer("model", visual_encoder="clip", llava=parts) == answer("finetune")
    (old / "visual_encoder_adapter").rename(tmp_path / "away")
    assert answer("model", visual_encoder="clip", llava=old) != answer("finetune")


def test_a_part_without_its_weights_is_named(workshop, tmp_path, capsys):
    old = write_old_parts(tmp_path / "old", workshop / "finetune" / "iter_8", pickled=True)
    (old / "llm_adapter" / "adapter_model.bin").unlink()
    assert main(["convert", "pth_to_hf", "finetune.py", str(old), str(tmp_path / "parts")]) == 2
    assert "llm_adapter: is not an adapter" in capsys.readouterr().err
    assert not (tmp_path / "parts").exists()


def test_an_encoder_is_merged_alone(workshop):
    command = ["convert", "merge", "clip", "finetune/iter_8/visual_encoder_adapter", "merged_clip"]
    assert main([*command, "--is-clip", "--dtype", "float32"]) == 0
    config = json.loads((workshop / "merged_clip" / "config.json").read_text())
    assert config["model_type"] == "clip_vision_model"
    from transformers import CLIPVisionModel

    before, after = (
        CLIPVisionModel.from_pretrained(workshop / name).state_dict()
        for name in ("clip", "merged_clip")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("layers.0." in n or "layers.1." in n for n in changed)


@pytest.mark.parametrize(
    ("dtype", "given", "written"),
    [
        ("float16", "finetune", "float16"),
        ("bfloat16", "finetune/iter_8", "bfloat16"),
        ("auto", "finetune/iter_8.pth", "float32"),
    ],
)
def test_an_encoder_is_merged_in_the_type_asked_for(workshop, tmp_path, dtype, given, written):
    command = ["convert", "merge", "clip", given, str(tmp_path / "merged"), "--is-clip"]
    assert main([*command, "--dtype", dtype]) == 0
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {str(t.dtype) for t in tensors.values() if t.is_floating_point()} == {f"torch.{written}"}


def test_no_adapter_of_an_encoder_is_named(workshop, tmp_path, capsys):
    command = ["convert", "merge", "clip", "pretrain", str(tmp_path / "merged"), "--is-clip"]
    assert main(command) == 2
    assert "is not an adapter of a vision tower" in capsys.readouterr().err


@pytest.mark.parametrize(
    "part", ["projector/model", "llm_adapter/adapter_model", "visual_encoder_adapter/adapter_model"]
)
def test_a_damaged_part_is_named(workshop, tmp_path, capsys, part):
    parts = tmp_path / "parts"
    shutil.copytree("finetune/iter_8", parts)
    file = parts / f"{part}.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    merged, whole = str(tmp_path / "merged"), str(tmp_path / "whole")
    to_hf = ["convert", "pth_to_hf", "finetune.py", str(parts), whole]
    commands = [
        ["chat", str(parts), "--ask", "Hello?"],
        to_hf,
        [*to_hf, "--save-format", "huggingface"],
    ]
    if "llm" in part:
        commands += [["convert", "merge", "model", str(file.parent), merged]]
    if "visual" in part:
        commands += [["convert", "merge", "clip", str(file.parent), merged, "--is-clip"]]
    for command in commands:
        assert main(command) == 2
        err = capsys.readouterr().err
        assert str(file.parent) in err and "Traceback" not in err


@pytest.mark.parametrize("name", ["clip", "model", "whole"])
def test_a_damaged_model_is_named(workshop, tmp_path, capsys, name):
    shutil.copytree(answering("whole") if name == "whole" else name, tmp_path / name)
    file = tmp_path / name / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    llm, encoder = (str(tmp_path / n if n == name else n) for n in ("model", "clip"))
    command = ["chat", llm, "--visual-encoder", encoder, "--llava", "finetune/iter_8"]
    command = ["chat", str(tmp_path / "whole")] if name == "whole" else command
    assert main([*command, "--ask", "Hello?"]) == 2
    err = capsys.readouterr().err
    assert str(tmp_path / name) in err and "Traceback" not in err


def test_one_conversation_with_images_and_without(workshop, capsys):
    command = ["chat", "finetune", "--dtype", "float32", "--max-new-tokens", "3"]
    asked = ["--image", "images/1.png", "--ask", "Which number is this?", "--ask", "Sure?"]
    assert main([*command, *asked]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert main([*command, "--ask", "Hello?"]) == 0
    assert main([*command, "--image", "nowhere.png", "--ask", "What?"]) == 2
    assert "nowhere.png" in capsys.readouterr().err


def test_placeholder_without_an_image_does_not_end_the_conversation(workshop, capsys, monkeypatch):
    lines = "What is <image>?\n\nIMAGE images/1.png\nToo <image> many <image>?\n\nWhich?\n\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", "finetune", "--dtype", "float32", "--max-new-tokens", "3"]) == 0
    told = capsys.readouterr()
    assert told.err.count("write it once per image") == 2
    assert told.out.strip() and "Traceback" not in told.err


def test_placeholder_in_the_system_message_is_rejected(workshop, capsys):
    command = ["chat", "finetune", "--dtype", "float32", "--ask", "Hi"]
    assert main([*command, "--system", "You see <image>."]) == 2
    assert "the system message contains <image>" in capsys.readouterr().err
    assert main(["train", "finetune.py", "--set", "SYSTEM='You see <image>.'"]) == 2
    assert "images belong in the user turns" in capsys.readouterr().err


def test_placeholder_in_an_answer_takes_no_image(workshop, monkeypatch):
    options = GenerationOptions(max_new_tokens=2, temperature=0)
    session = open_chat("finetune", options=options, dtype="float32")
    with monkeypatch.context() as patch:
        patch.setattr(session, "_generate", lambda *a, **b: (p for p in ("An <im", "age>")))
        assert "".join(session.ask("Hi")) == "An <image>"
    assert "".join(session.ask("And?")) is not None
    assert len(session.messages) == 4
    with pytest.raises(DataError, match="no image"):
        session.vision.expanded([261], [Message("user", "<image>")])


ADAPTER = "finetune/iter_8/llm_adapter"


def test_an_adapter_is_put_on_the_language_model_of_a_llava(workshop, tmp_path):
    """--adapter keeps the image input, for a work dir and with --llava."""
    joined = tmp_path / "joined"
    shutil.copytree("pretrain/iter_4", joined)
    shutil.copytree(ADAPTER, joined / "llm_adapter")
    wanted = answer(joined)
    assert wanted != answer("pretrain")
    assert answer("pretrain", adapter=ADAPTER) == wanted
    assert answer("model", llava="pretrain", visual_encoder="clip", adapter=ADAPTER) == wanted
    assert answer(ADAPTER, llava="pretrain") == wanted


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("finetune", {"adapter": ADAPTER}, "already has the adapter"),
        ("whole", {"adapter": ADAPTER}, "merged LLaVA model"),
        ("whole", {"llava": "pretrain"}, "itself a LLaVA model"),
        ("finetune", {"llava": "pretrain"}, "itself a LLaVA model"),
        ("whole", {"visual_encoder": "clip"}, "requires --llava"),
    ],
)
def test_incompatible_parts_are_rejected(workshop, model, options, message):
    answering("whole")
    with pytest.raises(XTunerError, match=message):
        answer(model, **options)


def test_replacing_trained_parts_is_warned_about(workshop, tmp_path, caplog):
    parts = tmp_path / "parts"
    shutil.copytree("pretrain/iter_4", parts)
    shutil.copytree("clip", parts / "visual_encoder")
    with pytest.raises(ConfigError, match="remove --visual-encoder"):
        answer(parts, visual_encoder="clip")
    shutil.copytree("model", parts / "llm")
    assert answer(parts) == answer("pretrain") and not caplog.records
    other = tiny_model_folder(tmp_path / "other", seed=5)
    assert answer(other, llava=parts) == answer("pretrain")
    assert f"replaces {other}" in caplog.text


def test_parts_that_were_not_trained_together_are_warned_about(workshop, tmp_path, caplog):
    answer("model", llava="pretrain", visual_encoder="clip")
    assert not caplog.records
    siglip = tiny_vision_tower_folder(tmp_path / "siglip", "siglip")
    other = tiny_model_folder(tmp_path / "other", seed=5)
    answer("pretrain", visual_encoder=siglip)
    assert f"trained with the vision tower {workshop / 'clip'}" in caplog.text
    caplog.clear()
    answer(other, llava="pretrain")
    assert f"trained with the language model {workshop / 'model'}" in caplog.text


def test_complete_model_is_stored_in_four_bits(workshop):
    session = open_chat(
        answering("whole"), bits=4, dtype="float32", options=GenerationOptions(max_new_tokens=3)
    )
    kinds = {name: type(m).__name__ for name, m in session.model.named_modules()}
    quantised = {name for name, kind in kinds.items() if kind == "Linear4bit"}
    assert len(quantised) == 14 and all("language_model" in name for name in quantised)
    "".join(session.ask("Which number is this?", ["images/5.png"]))


def test_encoder_runs_once_per_image_and_conversation(workshop, monkeypatch):
    looked = []
    features = LlavaEmbedder.features

    def counted(self, pixels):
        looked.append(len(pixels))
        return features(self, pixels)

    monkeypatch.setattr(LlavaEmbedder, "features", counted)
    session = open_chat(
        "finetune", dtype="float32", options=GenerationOptions(max_new_tokens=2, temperature=0)
    )
    "".join(session.ask("Which number is this?", ["images/1.png"]))
    "".join(session.ask("And that?", ["images/2.png"]))
    "".join(session.ask("Sure?"))
    assert looked == [1, 1]


class Noting(Session):
    """A session that notes the images and the answer of every turn."""

    def __init__(self, like):
        vars(self).update(vars(like))
        self.turns = []

    def ask(self, text, images=()):
        pieces = []
        for piece in super().ask(text, images):
            pieces.append(piece)
            yield piece
        self.turns.append(("".join(pieces), [m.images for m in self.messages if m.role == "user"]))


def opened(model):
    options = GenerationOptions(max_new_tokens=6, temperature=0)
    return open_chat(model, dtype="float32", options=options)


def test_images_and_text_in_a_terminal_conversation(workshop):
    lines = iter([
        "IMAGE images/1.png", "Which number is this?", "", "Are you sure?", "",
        "IMAGE images/2.png", "IMAGE nowhere.png", "And that?", "", "Which is more?", "",
        "RESET", "Which number is this?", "", "IMAGE images/2.png", "Which number is this?", "",
        "EXIT",
    ])  # fmt: skip
    session, notes = Noting(opened("finetune")), io.StringIO()
    Terminal(lambda prompt: next(lines), io.StringIO(), notes, interactive=True).converse(session)
    assert "nowhere.png" in notes.getvalue() and notes.getvalue().count("(image 1 ") == 3
    one, two = ("images/1.png",), ("images/2.png",)
    assert [seen for _, seen in session.turns] == [
        [one], [one, ()], [one, (), two], [one, (), two, ()], [()], [(), two]
    ]  # fmt: skip
    # The answers equal those to the complete conversation, generated without a cache.
    for number, history in ((3, session.turns[:4]), (5, session.turns[4:])):
        fresh = opened("finetune")
        questions = ["Which number is this?", "Are you sure?", "And that?", "Which is more?"]
        questions = questions if number == 3 else [questions[0], questions[0]]
        *before, (wanted, shown) = history
        for (answered, _), text, images in zip(before, questions, shown, strict=False):
            fresh.messages += [question(text, images), Message("assistant", answered)]
        assert "".join(fresh.ask(questions[-1], shown[-1])) == wanted


def test_siglip_from_training_to_plain_transformers(workshop, tmp_path):
    """An encoder without CLS: all features are tokens."""
    tiny_vision_tower_folder(workshop / "siglip", "siglip", initializer_range=0.5)
    text = FINETUNE.replace('"clip"', '"siglip"').replace('pretrained_pth = "pretrain/iter_4"', "")
    (workshop / "sig.py").write_text(text, encoding="utf-8")
    assert main(["train", "sig.py", "--work-dir", "sig", "--set", "max_steps=1"]) == 0
    wanted = answer("sig")
    assert wanted != answer("sig", image="images/9.png")
    command = ["convert", "pth_to_hf", "sig.py", "sig", "sig_whole", "--fp32"]
    assert main([*command, "--save-format", "huggingface"]) == 0
    assert answer("sig_whole") == wanted
    assert plain_answer("sig_whole", "images/5.png") == wanted
    command = ["convert", "merge", "siglip", "sig", str(tmp_path / "merged"), "--is-clip"]
    assert main(command) == 0


def test_mmbench_asks_the_finetuned_model(workshop, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(workshop)
    image = base64.b64encode((workshop / "images" / "0.png").read_bytes()).decode()
    rows = ["index\tquestion\tA\tB\tanswer\tcategory\timage", f"7\tWhich?\t0\t1\tA\tn\t{image}"]
    (tmp_path / "bench.tsv").write_text("\n".join(rows) + "\n")
    arguments = ["--data-path", str(tmp_path / "bench.tsv"), "--work-dir", str(tmp_path / "out")]
    assert main(["mmbench", "finetune", *arguments, "--max-new-tokens", "3"]) == 0
    assert "circular" in capsys.readouterr().out
    assert (tmp_path / "out" / "mmbench_result.xlsx").is_file()
