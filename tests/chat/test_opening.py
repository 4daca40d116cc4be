"""How `xtuner chat` resolves folders."""

import json
import shutil
from pathlib import Path

import pytest
from tuned_makers import write_adapter

from xtuner.chat import lookup, opening
from xtuner.errors import ConfigError, ModelError
from xtuner.generation.generate import GenerationOptions
from xtuner.hub import fetch
from xtuner.models.references import same_model
from xtuner.models.run_info import RunInfo
from xtuner.testing.tiny import tiny_model_folder

SYSTEM = "You are the assistant of Ada."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work dir with the checkpoint of an adapter whose base model is next to it."""
    root = tmp_path_factory.mktemp("run")
    base = tiny_model_folder(root / "base")
    write_adapter(root / "work", base, system=SYSTEM)
    return root


def ask(model: Path | str, **options) -> str:
    session = opening.open_chat(
        model, options=GenerationOptions(max_new_tokens=12), dtype="float32", **options
    )
    return "".join(session.ask("Who are you?"))


def test_checkpoint_records_base_adapter_template_and_system(run: Path) -> None:
    base = str(run / "base")
    found = lookup.find(str(run / "work" / "iter_7"))
    assert (found.model, found.adapter) == (base, run / "work" / "iter_7")
    assert (found.template, found.system) == ("chatml", SYSTEM)
    tuned = ask(run / "work" / "iter_7")
    assert tuned == ask(run / "work") == ask(run / "work" / "iter_7.pth")
    assert tuned == ask(base, adapter=run / "work")
    assert tuned != ask(base, prompt_template="chatml", system=SYSTEM)


def test_flags_override_what_the_checkpoint_says(run: Path) -> None:
    session = opening.open_chat(run / "work", prompt_template="vicuna", system="Other.")
    assert (session.template.name, session.template.system) == ("vicuna", "Other.")
    session = opening.open_chat(run / "work", system="")
    assert session.template.system == ""


def test_an_adapter_of_other_tools_names_its_base(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "an adapter"
    shutil.copytree(run / "work" / "iter_7", folder)
    for name in ("run.yaml", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    found = lookup.find(str(folder))
    assert found == lookup.ChatSource(str(run / "base"), folder, tokenizer=str(run / "base"))

    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"gone, which no longer exists.*--adapter '.*an adapter'$"
    ):
        lookup.find(str(folder))
    assert lookup.find(str(run / "base"), adapter=str(folder)).adapter == folder


def test_a_model_that_xtuner_wrote_knows_its_template(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "base", tmp_path / "merged")
    RunInfo("model", "base", prompt_template="zephyr", system=SYSTEM).write(tmp_path / "merged")
    session = opening.open_chat(tmp_path / "merged")
    assert (session.template.name, session.template.system) == ("zephyr", SYSTEM)


def test_a_base_model_needs_a_template(tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", chat_template=None)
    with pytest.raises(ModelError, match="such as --prompt-template default"):
        opening.open_chat(base)
    assert opening.open_chat(base, prompt_template="default").template.name == "default"


def test_fetched_model_is_found_by_its_name(run: Path) -> None:
    shutil.copytree(run / "base", fetch.models_root() / "smollm2_135m_instruct")
    assert ask("smollm2_135m_instruct") == ask(run / "base")
    assert ask("HuggingFaceTB/SmolLM2-135M-Instruct") == ask(run / "base")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("{run}/work/iter_9", r"no such folder; .*work contains iter_7, last_checkpoint"),
        ("{run}", r"looked for config\.json .*; the folder contains base, work"),
        ("smollm2_360m_instruct", r"`xtuner fetch smollm2_360m_instruct`"),
        ("./nothing", r"\./nothing: no such folder"),
    ],
)
def test_missing_packages_are_reported(run: Path, model: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        opening.open_chat(model.format(run=run))


def test_two_adapters_or_a_wrong_one_are_refused(run: Path) -> None:
    with pytest.raises(ModelError, match="is itself an adapter"):
        lookup.find(str(run / "work"), adapter=str(run / "work"))
    with pytest.raises(ModelError, match=r"--adapter .*base: looked for"):
        lookup.find(str(run / "base"), adapter=str(run / "base"))
    with pytest.raises(ConfigError, match="bits = 3"):
        opening.open_chat(run / "base", bits=3)


def test_four_bits(run: Path) -> None:
    session = opening.open_chat(run / "work", bits=4, dtype="float32")
    assert session.model.get_base_model().is_loaded_in_4bit
    assert "".join(session.ask("Hi")) == "".join(
        opening.open_chat(run / "work", bits=4, dtype="float32").ask("Hi")
    )


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("internlm/internlm2-chat-1_8b", "models/internlm2-chat-1_8b", True),
        ("internlm/internlm2-chat-7b", "models/internlm2-chat-1_8b", False),
        ("other/internlm2-chat-1_8b", "models/internlm2-chat-1_8b", False),
        ("models/../models/internlm2-chat-1_8b", "models/internlm2-chat-1_8b", True),
    ],
    ids=["of the hub", "of another size", "two folders", "one folder"],
)
def test_whether_two_names_mean_one_model(one, other, same, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("models", "other"):
        (tmp_path / folder / "internlm2-chat-1_8b").mkdir(parents=True)
    assert same_model(one, other) == same
