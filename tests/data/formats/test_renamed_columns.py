"""Renamed columns: common names, the setting `columns`, and notes."""

import pickle

import pytest

from xtuner.config.load import load_settings
from xtuner.data.formats import resolve
from xtuner.data.sources.resolve import prepare
from xtuner.data.sources.rows import parse
from xtuner.errors import ConfigError, DataError


def read(tmp_path, text, *, name="rows.csv", **settings):
    """The conversations of a file and the notes on it."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    loaded = load_settings(
        {"pretrained_model_name_or_path": "m", "data_path": name, **settings},
    )
    (source,) = prepare(loaded.settings, folder=tmp_path)
    values = [task.row.value for task in source.tasks()]
    rows = [parse(value) if isinstance(value, bytes) else value for value in values]
    made = [source.formats[0].convert(row) for row in rows]
    return [[(m.role, m.content) for m in record.messages] for record in made], source.notes


@pytest.mark.parametrize(
    "header",
    [
        "问题,回答", "提问,答案", "Q,A", "Question,Answer", "prompt,response", "问,答",
        " question , ANSWER", "query,response", "user,assistant", "客户问题,客服回答",
    ],
)  # fmt: skip
def test_usual_headers_are_a_question_and_its_answer(tmp_path, header):
    (turns,), _ = read(tmp_path, f"{header}\n几点开门？,九点\n")
    assert turns == [("user", "几点开门？"), ("assistant", "九点")]


def test_renaming_is_noted(tmp_path):
    _, notes = read(tmp_path, "问题,回答\na,b\n")
    assert notes == ("rows.csv: reads column '问题' as 'question' and '回答' as 'answer'",)
    assert read(tmp_path, "question,answer\na,b\n")[1] == ()


def test_instruction_input_and_output_in_chinese(tmp_path):
    (turns,), _ = read(tmp_path, "指令,输入,输出\n翻译,好,good\n")
    assert turns == [("user", "翻译\n好"), ("assistant", "good")]
    (turns,), _ = read(tmp_path, "输入,输出\n好,good\n")
    assert turns == [("user", "好"), ("assistant", "good")]


@pytest.mark.parametrize(("sign", "word"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical")])
def test_other_separators_are_recognised_with_a_note(tmp_path, sign, word):
    (turns,), notes = read(tmp_path, f"question{sign}answer\na, b{sign}c\n")
    assert turns == [("user", "a, b"), ("assistant", "c")]
    assert word in notes[0]


def test_a_separator_within_cells_changes_nothing(tmp_path):
    (turns,), notes = read(tmp_path, 'question,"answer;x",answer\na;b,c,d\n')
    assert turns == [("user", "a;b"), ("assistant", "d")]
    assert not any("separated" in note for note in notes)


def test_the_setting_maps_any_names(tmp_path):
    columns = {"kunde": "user", "beraten": "assistant", "rolle": "system"}
    (turns,), notes = read(tmp_path, "kunde,beraten,rolle\na,b,c\n", columns=columns)
    assert turns == [("system", "c"), ("user", "a"), ("assistant", "b")]
    assert "'kunde' as 'question'" in notes[0]


def test_the_setting_decides_over_columns_that_a_format_reads(tmp_path):
    text = '{"question": "old", "answer": "old", "q2": "new", "a2": "newer"}\n'
    columns = {"q2": "user", "a2": "assistant"}
    (turns,), _ = read(tmp_path, text, name="rows.jsonl", columns=columns)
    assert turns == [("user", "new"), ("assistant", "newer")]


def test_the_setting_may_name_a_column_of_a_format(tmp_path):
    columns = {"aufgabe": "instruction", "loesung": "output"}
    (turns,), _ = read(tmp_path, "aufgabe,loesung,input\na,b,c\n", columns=columns)
    assert turns == [("user", "a\nc"), ("assistant", "b")]


def test_wrong_entries_of_the_setting_are_refused(tmp_path):
    text = "kunde,beraten\na,b\n"
    with pytest.raises(ConfigError, match=r"'kunde' is read as 'usr'.*did you mean 'user'"):
        read(tmp_path, text, columns={"kunde": "usr", "beraten": "assistant"})
    with pytest.raises(ConfigError, match="'beraten' and 'kunde' are read as the same"):
        read(tmp_path, text, columns={"kunde": "user", "beraten": "user"})
    with pytest.raises(DataError, match="no file of data_path has a column 'frage'"):
        read(tmp_path, text, columns={"kunde": "user", "beraten": "assistant", "frage": "system"})


def test_competing_names_are_not_guessed(tmp_path):
    with pytest.raises(DataError, match=r"columns = .'提问': 'user', '问题': 'assistant'"):
        read(tmp_path, "提问,问题,回答\na,b,c\n")


def test_no_fit_names_the_setting_before_python(tmp_path):
    with pytest.raises(DataError) as caught:
        read(tmp_path, "kunde,beraten\na,b\n")
    text = str(caught.value)
    assert text.index("columns = {'kunde': 'user', 'beraten': 'assistant'}") < text.index(".py:")
    assert "'question' and 'answer'" in text


def test_a_header_that_looks_like_data_is_named(tmp_path):
    with pytest.raises(DataError, match="looks like data: put a line such as question,answer"):
        read(tmp_path, "你们几点开门？,早上九点\n多少钱？,十元\n")


def test_full_width_separators_are_named(tmp_path):
    with pytest.raises(
        DataError, match="separated by the full-width character ，: write , in every"
    ):
        read(tmp_path, "问题，回答\n你好，您好\n")


def test_a_renamed_format_can_be_sent_to_a_process():
    format = resolve("auto", columns=("问题", "回答"))
    again = pickle.loads(pickle.dumps(format))
    assert again.convert({"问题": "a", "回答": "b"}) == format.convert({"问题": "a", "回答": "b"})


def test_a_named_format_finds_its_columns_too():
    format = resolve(
        "qa", columns=("Frage", "Antwort"), names={"Frage": "user", "Antwort": "assistant"}
    )
    assert format.convert({"Frage": "a", "Antwort": "b"}).messages[1].content == "b"
