"""`train` returns its result, and uses a user's strategy."""

import json
from pathlib import Path

import recording_strategy

from xtuner.config.load import load_settings
from xtuner.runs.folder import RunFolder
from xtuner.training.run import train


def test_a_run_with_a_users_strategy(tmp_path, tiny_model_path, monkeypatch, capsys):
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"},
                      {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(12)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = Path(recording_strategy.__file__).read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    chosen = {
        "pretrained_model_name_or_path": str(tiny_model_path),
        "data_path": "rows.jsonl",
        "strategy": "mine.py:Recording",
        "tuning": "full",
        "max_length": 64,
        "max_steps": 2,
        "accumulative_counts": 1,
        "tensorboard": False,
        "num_threads": 1,
        "work_dir": str(tmp_path / "w"),
    }
    config = tmp_path / "config.py"
    lines = (f"{name} = {value!r}" for name, value in chosen.items())
    config.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setenv("RECORDED", str(tmp_path / "calls"))

    def calls():
        return (tmp_path / "calls").read_text(encoding="utf-8").split()

    done = train(load_settings(str(config)))
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {tmp_path / 'w' / 'report.html'}"
    record = RunFolder(done.work_dir).record
    assert (record.outcome, record.total_steps, record.settings["strategy"]) == (
        "finished",
        2,
        "mine.py:Recording",
    )
    assert record.forecast["peak"] > 0
    assert (done.work_dir, done.checkpoint, done.step) == (
        tmp_path / "w",
        tmp_path / "w" / "iter_2",
        2,
    )
    assert done.metrics["loss"] > 0 and done.metrics["supervised_tokens"] > 0
    assert calls().count("step") == 2
    assert calls()[-2:] == ["trained_weights", "optimizer_state"]
    again = train(load_settings(str(config)), resume="last")
    assert (again.step, again.metrics, again.checkpoint) == (2, {}, done.checkpoint)
    assert calls()[-1] == "load_optimizer_state"
