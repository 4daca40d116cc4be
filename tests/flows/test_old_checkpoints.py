"""Checkpoints and settings files of the commit before the second edition still work.

See tests/fixtures/README.md for what is in the archive and how it was made.
"""

import json
import tarfile
from pathlib import Path

import pytest

from xtuner.cli.app import main
from xtuner.config.load import load_settings

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "checkpoints_9b179c7.tar.xz"
NAMES = ["lora", "full", "qlora"]


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the commit's output, as if it had been written here."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for file in [*tmp_path.glob("runs/*/iter_3/run.yaml"), *tmp_path.glob("runs/*/*.py")]:
        file.write_text(file.read_text().replace("/tmp/fx/", f"{tmp_path}/"))
    for file in tmp_path.glob("runs/*/iter_3/adapter_config.json"):
        file.write_text(file.read_text().replace("/tmp/fx/", f"{tmp_path}/"))
    monkeypatch.chdir(tmp_path)
    return json.loads((tmp_path / "expected.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_gives_the_losses_of_the_commit_that_began_it(name, old, capsys):
    assert main(["train", f"{name}.py", "--work-dir", f"runs/{name}", "--resume"]) == 0
    assert "differ" not in capsys.readouterr().out  # no relevant setting has changed
    (log,) = Path("runs", name).glob("2*/scalars.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    found = [(v["step"], v["loss"], v["grad_norm"]) for v in lines if "loss" in v]
    wanted = [tuple(values[:3]) for values in old["losses"][name] if values[0] > 3]
    assert [step for step, *_ in found] == [4, 5, 6]
    assert [values for _, *values in found] == [pytest.approx(v[1:], rel=1e-6) for v in wanted]


@pytest.mark.parametrize("name", NAMES)
def test_an_old_checkpoint_answers_as_before(name, old, capsys):
    assert main(["chat", f"runs/{name}", "--max-new-tokens", "8", "--ask", "1 2 3"]) == 0
    assert capsys.readouterr().out == old["answers"][name]


@pytest.mark.parametrize("name", NAMES)
def test_an_old_checkpoint_converts(name, old, capsys):
    assert main(["convert", "pth_to_hf", f"{name}.py", f"runs/{name}", "out"]) == 0
    if name != "full":
        assert main(["convert", "merge", "base", "out", "merged"]) == 0
        capsys.readouterr()
        assert main(["chat", "merged", "--max-new-tokens", "8", "--ask", "1 2 3"]) == 0
        assert capsys.readouterr().out == old["answers"][name]


@pytest.mark.parametrize("name", NAMES)
def test_old_settings_files_load_unchanged(name, old):
    """The user's file, and the run's record of all settings."""
    own, recorded = load_settings(f"{name}.py"), load_settings(f"runs/{name}/{name}.py")
    changed = {n for n, v in own.settings if getattr(recorded.settings, n) != v}
    # 'auto' came after the recorded True, which is what 'auto' is for this model, and after 16
    paths = {"pretrained_model_name_or_path", "data_path"}
    assert changed <= {*paths, "pack_to_max_length", "lora_alpha"}
    assert recorded.settings.lora_alpha == 16
    assert recorded.settings.pack_to_max_length is True
