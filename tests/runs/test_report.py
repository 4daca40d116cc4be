"""The report of a run, from files like those that a run writes."""

import json
import re
from pathlib import Path

import pytest

from xtuner import i18n
from xtuner.cli.app import main
from xtuner.config.schema import Settings
from xtuner.errors import CheckpointError
from xtuner.runs import chart, report
from xtuner.runs.answers import marked
from xtuner.runs.folder import RunFolder
from xtuner.runs.record import RunRecord

SCRIPT = "<script>alert(1)</script>"


def start(work_dir, time, *, steps, start_step=0, outcome="finished", loss=3.0):
    """Write the log folder of one start that did `steps`."""
    log_dir = work_dir / time
    log_dir.mkdir(parents=True)
    settings = Settings(pretrained_model_name_or_path="tiny", data_path="rows.jsonl", lr=1e-3)
    record = RunRecord(
        name="rows",
        settings=settings.model_dump(mode="json"),
        changed=("lr",),
        versions={"torch": "2.13"},
        start_step=start_step,
        total_steps=8,
        forecast={"peak": 2**30, "available": 2**32},
    )
    record.ending(outcome).write(log_dir)
    lines = [
        {"step": s, "loss": loss - 0.1 * s, "seconds": 2.0, "memory_mb": 900, "lr": 1e-3}
        for s in steps
    ]
    (log_dir / "scalars.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step', "utf-8")
    return log_dir


def answer(log_dir, step, text, when="after step"):
    row = {"question": f"Who? {SCRIPT}", "images": [], "answer": text}
    line = json.dumps({"step": step, "when": when, "answers": [row]})
    with (log_dir / "sample_answers.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@pytest.fixture
def run(tmp_path):
    """A run that was stopped at step 4 and resumed from step 3."""
    work_dir = tmp_path / "w"
    first = start(work_dir, "20261128_100000", steps=[1, 2, 3, 4], outcome="interrupted")
    answer(first, 0, "I do not know.", when="before training")
    second = start(work_dir, "20261128_110000", steps=[4, 5], start_step=3, loss=2.0)
    answer(second, 5, "I am Ada.", when="after training (step 5)")
    report_of_data = {
        "sources": [
            {
                "name": SCRIPT,
                "formats": {"openai": 1},
                "rows_read": 12,
                "rows_used": 11,
                "rows_left_out": 0,
                "lost": [{"what": "is not valid JSON", "count": 1, "first": [
                    {"file": "rows.jsonl", "unit": "line", "number": 7, "fault": SCRIPT}]}],
                "changed": [],
            }
        ],
        "train": {"samples": 11, "tokens": 99, "supervised_tokens": 40, "packs": 2, "fill": 0.5},
        "validation": None,
        "notes": [],
    }  # fmt: skip
    (second / "data_report.json").write_text(json.dumps(report_of_data), encoding="utf-8")
    (work_dir / "iter_5").mkdir()
    return work_dir


def test_starts_of_a_resumed_run_are_joined(run):
    folder = RunFolder(run)
    assert folder.series("loss") == [(1, 2.9), (2, 2.8), (3, 2.7), (4, 1.6), (5, 1.5)]
    assert [(e.step, e.answers[0]["answer"]) for e in folder.evaluations] == [
        (0, "I do not know."),
        (5, "I am Ada."),
    ]
    assert folder.status() == "finished"


def test_a_start_at_step_0_replaces_what_was_before(run):
    start(run, "20261128_120000", steps=[1])
    folder = RunFolder(run)
    assert folder.series("loss") == [(1, 2.9)]
    assert folder.evaluations == []


def test_a_start_that_is_loading_replaces_nothing(run):
    log_dir = run / "20261128_120000"
    log_dir.mkdir()
    (log_dir / "scalars.jsonl").touch()
    assert RunFolder(run).step == 5 and len(RunFolder(run).evaluations) == 2


def test_record_without_an_end_belongs_to_a_killed_run(run):
    start(run, "20261128_120000", steps=[6], start_step=5, outcome="")
    assert RunFolder(run).status() == "killed"


@pytest.mark.parametrize("language", i18n.LANGUAGES)
def test_the_page_is_self_contained_and_escaped(run, language):
    text = report.page(RunFolder(run), language=language)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search(r"(?:src|href)=|url\(|@import|https?://", text)
    assert "default-src 'none'" in text
    words = i18n.words(language)
    assert words("section_answers") in text and words("step_of", step=5, total=8) in text
    assert "rows.jsonl line 7" in text
    assert "lr = 1e-3" in text


def test_only_changed_words_are_marked():
    assert marked("I am a bot.", "I am Ada's bot.") == "I am <mark>Ada&#x27;s</mark> bot."
    assert marked("我是助手", "我是小助手") == "我是<mark>小</mark>助手"


def test_the_command_writes_the_report_and_prints_its_path(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert main(["report", str(run / "iter_5")]) == 2
    assert "is not the work dir" in capsys.readouterr().err


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no log folder"):
        RunFolder(tmp_path)


def test_every_string_has_both_languages_and_the_same_values():
    for key, row in i18n.table().items():
        english, chinese = (row[language] for language in i18n.LANGUAGES)
        assert english and chinese, key
        values = [set(re.findall(r"\{(\w+)[}:]", text)) for text in (english, chinese)]
        assert values[0] == values[1], key


@pytest.mark.parametrize(
    ("header", "language"),
    [("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("de,en;q=0.5", "en"), ("fr", "en"), ("", "en")],
    ids=["chinese", "german-english", "french", "none"],
)
def test_the_language_is_the_first_known_one_of_the_browser(header, language):
    assert i18n.preferred(header) == language


def test_the_loss_chart_has_whole_steps_and_marks_where_questions_were_asked(run):
    svg = report.loss_chart(RunFolder(run), i18n.words("en"))
    ticks = re.findall(r'text-anchor="middle">([^<]*)<', svg)
    assert ticks == [str(step) for step in range(6)]
    assert svg.count('<polygon class="third"') == 2 and "sample answers" in svg


def test_the_running_mean_of_a_chart_does_not_lag():
    falling = [(float(step), 10.0 - step) for step in range(10)]
    assert chart.smoothed(falling)[5][1] == pytest.approx(falling[5][1], abs=0.2)
    assert chart.smoothed([(1.0, float("nan")), (2.0, 3.0)]) == [(2.0, 3.0)]
    assert chart.smoothed([]) == []


def test_tokens_and_the_home_directory_are_not_in_the_report(run):
    home = str(Path.home())
    for file in run.rglob("*.json"):
        text = file.read_text().replace("rows.jsonl", f"{home}/rows.jsonl hf_{'a' * 30}")
        file.write_text(text.replace(json.dumps(SCRIPT)[1:-1], f"{home}/d.csv"))
    page = report.page(RunFolder(run), status="finished")
    assert "~/rows.jsonl &lt;token&gt;" in page and "<td>~/d.csv</td>" in page
    assert home not in page.replace(f"{home}er", "") and "hf_aaa" not in page
