"""What the documents show exists: commands, flags, settings, files; examples run."""

import json
import math
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main

import xtuner
from xtuner.cli._old_words import translated
from xtuner.cli.app import build_app, expand_overrides
from xtuner.config.builtin import catalog
from xtuner.config.load import load_settings
from xtuner.config.schema import ALIASES, Settings
from xtuner.config.table_files import table

ROOT = Path(__file__).parent.parent
SHOWN = [ROOT / "README.md", ROOT / "README_zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN += sorted((ROOT / "examples").rglob("*.sh"))
COMMAND = re.compile(r"(?:^|`|\$ |bin\"?/)(xtuner [^`\n#]*)", re.MULTILINE)


def commands():
    for file in SHOWN:
        for match in COMMAND.finditer(file.read_text(encoding="utf-8")):
            text = match.group(1).replace("$", "").split("   ")[0].split(" > ")[0]
            text = text.rstrip(" \\)").split(')"')[0]
            yield pytest.param(text, id=f"{file.name}: {text[:60]}")


@pytest.mark.parametrize("text", list(commands()))
def test_the_command_exists_with_these_flags(text):
    words = [w for w in shlex.split(re.sub("[\"']", "", text))[1:] if w not in ("...", "…")]
    words = translated(words)
    command = typer.main.get_command(build_app())
    flags = [w.split("=")[0] for w in expand_overrides(words) if w.startswith("--")]
    names = [w for w in words if re.fullmatch(r"[a-z][a-z_-]+", w)]
    while names and hasattr(command, "commands"):
        assert names[0] in command.commands, f"there is no command {names[0]!r}"
        command = command.commands[names.pop(0)]
    known = {flag for p in command.params for flag in p.opts} | {"--help", "--debug"}
    assert set(flags) <= known, text


def test_the_built_in_names_that_the_documents_show_exist():
    text = "\n".join(file.read_text(encoding="utf-8") for file in SHOWN)
    shown = set(re.findall(r"\b[a-z0-9_]+_(?:full|lora|qlora)_[a-z0-9_]+_e\d+\b", text))
    shown = {name.removesuffix("_copy") for name in shown if not name.startswith("my_")}
    assert shown and all(catalog.is_name(name) for name in shown)


def test_links_lead_somewhere():
    for file in SHOWN:
        for link in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (file.parent / link).exists(), f"{file.name}: {link}"


def test_the_readme_leads_to_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in ROOT.glob("docs/*.md") if f"docs/{page.name})" not in text]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


BASE = {
    "data_path": "rows.jsonl", "tuning": "lora", "lora_r": 4, "max_length": 64, "max_steps": 2,
    "accumulative_counts": 1, "num_threads": 1, "tensorboard": False,
}  # fmt: skip
ROW = '{"question": "What is 1 + 1?", "answer": "It is 2."}'


def write_run(folder, model, *, rows=(ROW,), settings=()):
    (folder / "rows.jsonl").write_text("\n".join([*rows] * 8), encoding="utf-8")
    base = {"pretrained_model_name_or_path": str(model), **BASE}
    lines = [f"{name} = {value!r}" for name, value in base.items()]
    file = folder / "my_run.py"
    file.write_text("\n".join([*lines, *settings]), encoding="utf-8")
    return file


def sections(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return {part.split("\n")[0]: part for part in text.split("\n## ")[1:]}


def test_the_examples_of_the_api_run(tmp_path, monkeypatch, tiny_model_path, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, tiny_model_path)
    namespace = {}
    for block in blocks((ROOT / "docs" / "api.md").read_text(encoding="utf-8"), "python"):
        exec(block, namespace)
    assert namespace["result"].checkpoint.is_dir()
    assert len(namespace["results"]) == 2


def extended(title, folder, model):
    """Train with the files, the rows and the settings of a section of the page."""
    section = sections("extend.md")[title]
    settings = []
    for block in blocks(section, "python"):
        first, _, rest = block.partition("\n")
        name = first.removeprefix("# ")
        if name == "settings":
            settings.append(rest)
        else:
            (folder / name).write_text(block, encoding="utf-8")
    rows = [row for block in blocks(section, "json") for row in block.splitlines()] or [ROW]
    assert all(json.loads(row) for row in rows) and settings
    return xtuner.train(
        write_run(folder, model, rows=rows, settings=settings), work_dir=folder / "run"
    )


def test_the_format_of_the_page_reads_its_rows(tmp_path, tiny_model_path):
    result = extended("A dataset format", tmp_path, tiny_model_path)
    report = json.loads(next(result.work_dir.glob("*/data_report.json")).read_text())
    assert "my_format.py:to_messages" in json.dumps(report)


def test_the_hook_of_the_page_logs(tmp_path, tiny_model_path, capsys):
    result = extended("A hook", tmp_path, tiny_model_path)
    assert result.metrics["best_loss"] <= result.metrics["loss"]
    assert "step 1: best loss" in capsys.readouterr().out


def test_the_algorithm_of_the_page_learns_from_pairs(tmp_path, tiny_model_path):
    result = extended("An algorithm", tmp_path, tiny_model_path)
    assert 0 <= result.metrics["accuracy"] <= 1
    assert math.isfinite(result.metrics["loss"]) and result.metrics["grad_norm"] > 0


def test_the_template_of_the_page_is_used(tmp_path, tiny_model_path):
    result = extended("A template", tmp_path, tiny_model_path)
    assert "my_templates.py:MINE" in (result.checkpoint / "run.yaml").read_text(encoding="utf-8")


def test_the_strategy_of_the_page_is_used(tmp_path, tiny_model_path, capsys):
    pytest.importorskip("xtuner.engine.strategies.replicated")
    extended("A strategy", tmp_path, tiny_model_path)
    assert "one parameter at a time" in capsys.readouterr().out


def test_the_row_of_the_page_makes_built_in_settings(monkeypatch):
    section = sections("extend.md")["A model"]
    ((name, row),) = tomllib.loads(blocks(section, "toml")[0]).items()
    monkeypatch.setitem(table("models")["models"], name, row)
    shown = re.findall(rf"\b{name}_\w+", section)
    assert shown
    for built_in in shown:
        settings = load_settings(built_in).settings
        assert settings.pretrained_model_name_or_path == row["path"]


def test_the_page_names_every_part_that_it_shows():
    page = sections("extend.md")
    assert len(page) == 6
    text = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    for anchor in re.findall(r"\]\(#([\w-]+)\)", text):
        assert anchor in {title.lower().replace(" ", "-") for title in page}


FILES = [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def test_settings_that_the_documents_assign_exist():
    known = {*Settings.model_fields, *ALIASES}
    for file in FILES:
        if file.name == "api.md":  # keyword arguments of functions, which its examples try
            continue
        text = file.read_text(encoding="utf-8")
        for name in re.findall(r"(?:`|--set )([a-z][a-z_]+) ?= ?(?=[\w\'\"\[])", text):
            assert name in known, f"{file.name}: there is no setting {name}"


def test_files_that_the_documents_name_exist():
    suffixes = "py|md|toml|c|cpp|sh"
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        for name in re.findall(rf"`((?:[\w.]+/)+[\w{{}},]+\.(?:{suffixes}))`", text):
            if name.endswith("/x.py") or name.startswith(("my_", "configs/")):
                continue
            places = (ROOT / name, ROOT / "src" / "xtuner" / name)
            assert any(place.exists() for place in places), f"{file.name}: there is no {name}"
