"""Columns that a format does not read are noted, or the file is rejected."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from data_makers import build_data, chat, write_jsonl

from xtuner.data.sources.find import find
from xtuner.errors import DataError

TURNS = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Cold."}]
SAID = [{"from": "human", "value": "Weather?"}, {"from": "gpt", "value": "Cold."}]


def notes(tmp_path, *rows, **settings):
    path = write_jsonl(tmp_path / "d.jsonl", list(rows))
    return [n for n in build_data(path, **settings).report.notes if "duplicate" not in n]


@pytest.mark.parametrize(
    ("row", "words", "format"),
    [
        ({"messages": TURNS, "label": False}, "'label' says which answers are good", "openai"),
        ({"conversations": SAID, "kto_tag": True}, "'kto_tag' says which", "sharegpt"),
        ({"prompt": "a", "completion": "b", "label": False}, "KTO", "code_alpaca"),
        ({"conversations": SAID, "chosen": SAID[1], "rejected": SAID[1]}, "preference", "sharegpt"),
        ({"messages": TURNS, "audios": ["a.wav"]}, "'audios' holds audio", "openai"),
        ({"messages": TURNS, "videos": ["a.mp4"]}, "'videos' holds video", "openai"),
    ],
)
def test_data_of_another_kind_is_refused_by_auto_and_noted_by_name(tmp_path, row, words, format):
    with pytest.raises(DataError, match=words) as caught:
        notes(tmp_path, row)
    assert f"set dataset_format = {format!r}" in str(caught.value)
    assert any(words in note for note in notes(tmp_path, row, dataset_format=format))


@pytest.mark.parametrize(
    "labels", [(0, 1), ("1", "0"), (1.0, -1.0, None), ("good", "bad"), ("bad",)]
)
def test_labels_of_good_and_bad_answers_may_be_numbers_or_words(tmp_path, labels):
    rows = [{"messages": TURNS, "label": label} for label in labels]
    with pytest.raises(DataError, match="'label' says which answers are good"):
        notes(tmp_path, *rows)


@pytest.mark.parametrize("labels", [(0, 1), ("good", "bad")])
def test_classes_of_texts_are_no_good_and_bad_answers(tmp_path, labels):
    rows = [{"sentence": "It is late.", "label": label} for label in labels]
    with pytest.raises(DataError, match=r"columns = \{") as caught:
        notes(tmp_path, *rows)
    assert "KTO" not in str(caught.value)
    rows = [{"instruction": "a", "output": "b", "label": label} for label in labels]
    assert notes(tmp_path, *rows)[0].endswith("the column 'label' is not read")


@pytest.mark.parametrize("labels", [(1, 1), (0, 1, 2), ("0", "sports"), (0.0, 0.5)])
def test_other_labels_are_noted(tmp_path, labels):
    rows = [{"messages": TURNS, "label": label} for label in labels]
    (note,) = notes(tmp_path, *rows)
    assert note.endswith("the column 'label' is not read")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference pairs"),
        ({"prompt": "a", "audio": "b.wav"}, "xtuner trains on text and images"),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "'input_ids' holds token ids"),
    ],
)
def test_data_that_fit_no_format_are_named_for_what_they_are(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        notes(tmp_path, row)


def test_columns_and_keys_that_are_not_read_are_noted_but_not_those_without_effect(tmp_path):
    turns = [TURNS[0], {**TURNS[1], "loss_mask": [1], "emotion": "calm", "id": 3, "note": None}]
    row = {"messages": turns, "id": 1, "source": "web", "label": "weather", "mood": "x"}
    (columns, keys) = notes(tmp_path, row)
    assert columns.endswith(": the columns 'label', 'mood' are not read")
    assert keys.endswith(": the keys 'loss_mask', 'emotion' of turns are not read")


def test_placeholders_that_nothing_fills_are_noted(tmp_path):
    (media, blank) = notes(tmp_path, chat("Listen: <audio>", "I am {{name}}."))
    assert "<audio> in a text is trained on as plain text" in media
    assert "{{name}} in a text is not replaced by anything" in blank


def test_nulls_that_a_schema_adds_are_not_trained_on(tmp_path):
    def row(name, arguments, properties):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        schema = {"type": "object", "properties": properties}
        return {
            "messages": [
                {"role": "user", "content": "Go."},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "ok"},
                {"role": "assistant", "content": "Done."},
            ],
            "tools": [{"type": "function", "function": {"name": name, "parameters": schema}}],
        }

    rows = [
        row("walk", {"city": "Oslo", "by": {"road": True}}, {"city": {"type": "string"}}),
        row("wait", {"hours": 3, "at": [{"x": 1}, {"y": 2}]}, {"hours": {"enum": [1, 3]}}),
    ]
    lines = write_jsonl(tmp_path / "d.jsonl", rows)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    for name in ("d.arrow", "saved/data.arrow"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with pyarrow.ipc.new_stream(tmp_path / name, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": "data.arrow"}], "_indices_data_files": None}
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    expected = [json.loads(line) for line in lines.read_text().splitlines()]
    for name in ("d.parquet", "d.arrow", "saved"):
        files = find(str(tmp_path / name), folder=tmp_path).files
        assert [raw.value for file in files for raw in file.rows()] == expected, name
