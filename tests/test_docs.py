"""Commands that the documents show exist, with the flags that they show."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from xtuner.cli.app import build_app, expand_overrides
from xtuner.config.builtin import catalog

ROOT = Path(__file__).parent.parent
SHOWN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
    shown = {name.removesuffix("_copy") for name in shown}
    assert shown and all(catalog.is_name(name) for name in shown)


def test_links_lead_somewhere():
    for file in SHOWN:
        for link in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (file.parent / link).exists(), f"{file.name}: {link}"
