"""The public API: its surface, and what scripts and notebooks rely on."""

import gc
import importlib.util
import inspect
import io
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

import xtuner
from xtuner import api
from xtuner.config.schema import ALIASES
from xtuner.engine import run_lock
from xtuner.engine.hooks import progress
from xtuner.errors import CheckpointError, ConfigError, DataError, LaunchError

INTERRUPTING_HOOK = """
import os, signal
from xtuner.engine.hooks.base import BaseHook

class Interrupt(BaseHook):
    def on_step(self, run):
        if run.step == 2 and run.start_step == 0:
            os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.fixture
def settings(tmp_path, tiny_model_path):
    """Settings of a run of four steps, as a dictionary."""
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(16)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {
        "pretrained_model_name_or_path": tiny_model_path,
        "data_path": [file],
        "tuning": "lora",
        "lora_r": 4,
        "max_length": 64,
        "max_steps": 4,
        "accumulative_counts": 1,
        "num_threads": 1,
        "tensorboard": False,
        "work_dir": tmp_path / "run",
    }


def test_the_surface_is_small_and_documented():
    assert set(xtuner.__all__) <= set(dir(xtuner))
    assert xtuner.__all__ == [
        "Chat", "TrainInterrupted", "TrainResult", "XTunerError", "__version__", "load_chat",
        "load_settings", "train",
    ]  # fmt: skip
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    for name in xtuner.__all__:
        part = getattr(xtuner, name)
        assert isinstance(part, str) or (callable(part) and part.__doc__), name
        assert f"`{name}" in page or f"xtuner.{name}" in page, f"docs/api.md lacks {name}"
        assert importlib.util.find_spec(f"xtuner.{name}") is None, "a module would replace the name"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        xtuner.trian  # noqa: B018


@pytest.mark.parametrize(
    ("function", "names"),
    [
        ("load_settings", ["config", "overrides"]),
        ("train", ["config", "work_dir", "resume", "overwrite", "wait", "overrides"]),
        (
            "load_chat",
            ["model", "adapter", "prompt_template", "system", "bits", "device", "dtype",
             "trust_remote_code", "trust_code", "options"],
        ),
    ],
)  # fmt: skip
def test_signatures_do_not_change_by_accident(function, names):
    assert list(inspect.signature(getattr(xtuner, function)).parameters) == names


def test_importing_and_loading_settings_import_no_torch(settings):
    code = (
        "import sys, xtuner; light = {*sys.modules}\n"
        f"xtuner.load_settings({ {k: str(v) for k, v in settings.items() if k[0] in 'pd'} })\n"
        "print(sorted(light & {'torch', 'transformers', 'pydantic', 'rich'}),\n"
        "      sorted({*sys.modules} & {'torch', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[] []\n", done.stderr


def test_a_dictionary_a_file_and_overrides_give_the_same_settings(tmp_path, settings):
    file = tmp_path / "mine.py"
    plain = {**settings, "data_path": settings["data_path"][0]}
    lines = [f"{k} = {(str(v) if isinstance(v, Path) else v)!r}" for k, v in plain.items()]
    file.write_text("\n".join(["lr = 0.5", *lines]), encoding="utf-8")
    from_file = xtuner.load_settings(file, lr=1e-3, max_epochs=2)
    from_values = xtuner.load_settings(settings, lr=1e-3, max_epochs=2)
    assert from_file.settings == from_values.settings
    assert (from_file.settings.lr, from_file.name) == (1e-3, "mine")


def test_override_replaces_an_alias(settings):
    old, new = next(iter(ALIASES.items()))
    value = getattr(xtuner.load_settings(settings).settings, new)
    loaded = xtuner.load_settings({**settings, new: "nonsense"}, **{old: value})
    assert getattr(loaded.settings, new) == value


def test_all_problems_are_reported_without_flags_or_lines(settings):
    with pytest.raises(ConfigError) as caught:
        xtuner.load_settings({**settings, "tuning": "lroa"}, lr="high", max_step=3)
    text = str(caught.value)
    assert "3 problems in settings" in text and "--set" not in text and "line" not in text
    assert "lr = 'high'" in text and "tuning = 'lroa'" in text and "did you mean" in text


def test_overrides_of_loaded_settings_and_contradictions_are_refused(settings):
    with pytest.raises(ConfigError, match="give overrides to load_settings"):
        xtuner.train(xtuner.load_settings(settings), lr=1e-3)
    with pytest.raises(ConfigError, match="resume and overwrite"):
        xtuner.train(settings, resume=True, overwrite=True)


def test_messages_name_arguments_instead_of_options(settings, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        xtuner.train(settings, resume=True)
    assert 'check work_dir, or start without resume=True. resume="auto" st' in str(caught.value)
    held = run_lock._held(tmp_path, io.StringIO("{}"))
    told = api._as_arguments(str(held))
    assert told.endswith("with work_dir=DIR, or wait until it ends with wait=True")
    told = api._as_arguments("use --resume-from, or `xtuner train --dry-run`")
    assert told == "use --resume-from, or `xtuner train --dry-run`"


def test_logs_of_a_killed_run_may_end_anywhere(tmp_path):
    (tmp_path / "1").mkdir()
    whole = json.dumps({"step": 1, "epoch": 0.5, "loss": 2.0, "note": "字"}, ensure_ascii=False)
    file = tmp_path / "1" / "scalars.jsonl"
    for size in range(len(whole.encode())):
        file.write_bytes(b'{"step": 1, "epoch": 0.5, "loss": 3.0}\n' + whole.encode()[:size])
        assert api._last_metrics(tmp_path) == {"loss": 3.0}


def test_two_trainings_in_one_process_give_the_same_and_leave_no_model(settings, tmp_path):
    import torch

    from xtuner.models.causal_lm import PackedCausalLM

    earlier = [o for o in gc.get_objects() if type(o) is PackedCausalLM]  # of other tests
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    first = xtuner.train(settings, validation_ratio=0.25)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    held = [o for o in gc.get_objects() if type(o) is PackedCausalLM]
    assert len(held) == len(earlier), "memory of the first run is not free for the second"
    second = xtuner.train(settings, validation_ratio=0.25, work_dir=tmp_path / "again")
    assert first.work_dir == tmp_path / "run" and second.work_dir == tmp_path / "again"
    for result in (first, second):
        assert result.checkpoint == result.work_dir / "iter_4" and result.checkpoint.is_dir()
        assert result.step == 4
    for name in ("loss", "val_loss", "lr", "grad_norm"):
        assert first.metrics[name] == second.metrics[name]


def test_training_off_the_main_thread_gives_the_same(settings, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    results = [xtuner.train(settings)]
    work = lambda: results.append(xtuner.train(settings, work_dir=tmp_path / "thread"))  # noqa: E731
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(results) == 2 and results[0].metrics["loss"] == results[1].metrics["loss"]
    assert signal.getsignal(signal.SIGINT) is before


def test_two_trainings_at_a_time_and_a_second_one_under_torchrun_are_refused(monkeypatch, settings):
    with api._training, pytest.raises(LaunchError, match="another training is running"):
        xtuner.train(settings)
    monkeypatch.setattr(api, "_groups_left", ["0"])
    with pytest.raises(LaunchError, match="start torchrun once per training"):
        xtuner.train(settings)
    assert not api._training.locked()


def test_an_interrupt_saves_raises_restores_the_handler_and_can_be_resumed(settings, tmp_path):
    (tmp_path / "hooks.py").write_text(INTERRUPTING_HOOK, encoding="utf-8")
    straight = xtuner.train(settings, work_dir=tmp_path / "straight")
    settings["custom_hooks"] = [f"{tmp_path / 'hooks.py'}:Interrupt"]
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        xtuner.train(settings)
    assert signal.getsignal(signal.SIGINT) is before
    assert isinstance(caught.value, xtuner.TrainInterrupted)
    assert caught.value.result.step == 2
    assert caught.value.result.checkpoint == tmp_path / "run" / "iter_2"
    resumed = xtuner.train(settings, resume=True)
    assert resumed.step == 4
    assert resumed.metrics["loss"] == straight.metrics["loss"]


def test_error_is_raised_as_an_exception(settings, tmp_path):
    settings["data_path"] = tmp_path / "missing.jsonl"
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        xtuner.train(settings)


def test_chat_answers_completely_and_in_pieces(tiny_model_path):
    chat = xtuner.load_chat(tiny_model_path, max_new_tokens=6, device="cpu")
    answer = chat.ask("Hello?")
    assert [m.role for m in chat.messages] == ["user", "assistant"]
    assert chat.messages[1].content == answer
    chat.reset()
    assert chat.messages == () and "".join(chat.stream("Hello?")) == answer
    chat.reset()
    assert len(chat.ask("Hello?", max_new_tokens=2)) < len(answer)
    chat.reset()
    assert chat.ask("Hello?") == answer, "an option of one answer has become that of all"
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        chat.ask("Hello?", temprature=1.0)
    with pytest.raises(DataError, match="images"):
        chat.ask("What is it?", images=["a.png"])
    assert len(chat.messages) == 2


def test_a_notebook_gets_a_bar_where_it_has_widgets(monkeypatch):
    notebook = Console(force_jupyter=True)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    assert not progress._can_draw(notebook)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: object())
    assert progress._can_draw(notebook)
    assert not progress._can_draw(Console(force_terminal=False))


OWN = """
from xtuner.templates.spec import Spec

MINE = Spec(user="Q: {content}\\n", assistant="A:", system="{content}\\n")
"""


def test_settings_of_the_caller_run_their_code_and_a_damaged_checkpoint_is_named(
    settings, tmp_path
):
    (file := tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    settings |= {"prompt_template": f"{file}:MINE", "max_steps": 1}
    saved = xtuner.train(settings).checkpoint
    file.unlink()
    assert xtuner.load_chat(saved, max_new_tokens=2, device="cpu").ask("Hello?") is not None
    state = saved / "training_state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    file.write_text(OWN, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"training_state\.pt: is damaged"):
        xtuner.train(settings | {"max_steps": 2}, resume=True)
