"""Continued pretraining of a base model, which has no chat template, through the command line."""

import json

from xtuner.cli.app import main
from xtuner.testing.tiny import tiny_model_folder


def test_every_token_of_a_text_is_learnt_and_a_prompt_is_continued(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_model_folder("model", chat_template=None, initializer_range=0.2)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("The sea is wide and blue. " * 20)
    (tmp_path / "texts" / "two.txt").write_text("Short.")
    (tmp_path / "config.yaml").write_text(
        "pretrained_model_name_or_path: model\ndata_path: texts\nalgorithm: pretrain\n"
        "tuning: full\nmax_length: 128\naccumulative_counts: 1\nmax_epochs: 30\nlr: 1e-2\n"
        "evaluation_inputs: ['The sea is']\nevaluation_max_new_tokens: 15\ntensorboard: false\n"
    )
    assert main(["train", "config.yaml"]) == 0
    (log_dir,) = [p for p in (tmp_path / "work_dirs" / "config").iterdir() if p.name[0].isdigit()]
    report = json.loads((log_dir / "data_report.json").read_text())
    tokens = 26 * 20 + 1 + len("Short.") + 1  # one byte is one token; each text ends with one more
    samples = -(-(26 * 20 + 1) // 128) + 1  # the long text is split, not cut
    assert report["train"]["tokens"] == tokens
    assert report["train"]["samples"] == samples
    assert report["train"]["supervised_tokens"] == tokens - samples
    after = sorted(log_dir.glob("eval_outputs_iter_*.txt"), key=lambda p: p.stat().st_mtime)[-1]
    assert "wide and blue" in after.read_text()
    capsys.readouterr()
    assert main(["chat", "work_dirs/config", "--max-new-tokens", "14", "--ask", "The sea is"]) == 0
    assert "wide and blue" in capsys.readouterr().out
