import json

import pytest
from data_makers import chat

from xtuner.cli.app import main

KEPT = "1 row is used with wrong tool calls (tool_call_errors = 'keep')."


@pytest.fixture
def check(tmp_path, tiny_model_path, capsys):
    config = tmp_path / "my_run.py"
    config.write_text(
        f"pretrained_model_name_or_path = {str(tiny_model_path)!r}\n"
        "data_path = 'd.jsonl'\n"
        "max_length = 64\n"
    )

    def run(lines, *arguments):
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in lines)
        (tmp_path / "d.jsonl").write_text(text)
        code = main(["check-custom-dataset", str(config), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return run


def test_good_data_passes(check):
    code, out, _ = check([chat("Hi", "Hello"), chat("Hi", "You")])
    assert code == 0
    assert out[0] == "Data         d.jsonl: 2 rows, format openai (auto)"
    assert out[-1] == "No bad rows."


def test_every_bad_row_is_named_with_field_and_hint(check):
    bad = chat("Hi", "x")
    bad["messages"][1]["role"] = "bot"
    rows = [chat("Hi", "Hello"), bad, '{"messages": [}', chat("long " * 20, "x"), chat("", "x")]
    code, out, _ = check(rows)
    assert code == 2
    assert out[:4] == [
        "d.jsonl line 2  messages[1].role: is 'bot'; it must be system, user, assistant or tool",
        "d.jsonl line 3  is not valid JSON (column 15: Expecting value)",
        "d.jsonl line 5  messages[0].content: is empty; fill it in or remove the row",
        "d.jsonl line 4  has no supervised token within max_length = 64; raise max_length",
    ]
    assert out[4] == "Data         d.jsonl: 5 rows, format openai (auto)"
    assert out[-1] == "4 bad rows."


def test_many_bad_rows_are_cut_on_the_screen_but_not_in_the_file(check, tmp_path):
    rows = [chat("Hi", "Hello")] + [chat("", "x")] * 70
    code, out, _ = check(rows)
    assert code == 2
    assert sum(line.startswith("d.jsonl line") for line in out) == 50
    assert "and 20 more; --out FILE writes all of them" in out
    code, out, _ = check(rows, "--out", tmp_path / "bad.txt")
    assert f"and 20 more; see {tmp_path / 'bad.txt'}" in out
    written = (tmp_path / "bad.txt").read_text().splitlines()
    assert [line.split()[2] for line in written] == [str(n) for n in range(2, 72)]


def test_data_of_bad_rows_only_is_listed_too(check):
    code, out, err = check([chat("", "x")] * 2)
    assert (code, err) == (2, "")
    assert out[-1] == "2 bad rows."


def test_unwritable_file_is_reported(check, tmp_path):
    code, _, err = check([chat("Hi", "Hello")], "--out", tmp_path / "no" / "bad.txt")
    assert code == 2
    assert err.startswith("DataError: --out")


def test_a_file_that_cannot_be_read_does_not_end_the_check(check, tmp_path):
    good = json.dumps(chat("Hi", "Hello"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(b"PAR1 is no parquet")
    (folder / "b.jsonl").write_text(f"{good}\n{{}}\n", encoding="utf-8")
    (folder / "c.json").write_text(f"[{good}, ", encoding="utf-8")
    (folder / "d.jsonl").write_text(f"{{}}\n{good}\n", encoding="utf-8")
    code, out, _ = check([], "--set", "data_path=['data', 'none.csv']")
    assert code == 2 and out[-1] == "2 bad rows, 3 files that cannot be read."
    for name in ("a.parquet", "b.jsonl line 2", "c.json", "d.jsonl line 1", "none.csv"):
        assert any(name in line for line in out), name


def test_rows_kept_with_wrong_calls_are_counted_and_named(check):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "g", "arguments": "{}"}}
    rows = [chat("Hi", "Hello"), {**chat("Hi", ""), "tools": [tool]}]
    rows[1]["messages"][1]["tool_calls"] = [call]
    problem = "turn [2], call of 'g': calls a tool that the row does not declare; add the tool"
    keep = ("--set", "max_length=2000", "--set", "tool_call_errors=keep")
    code, out, _ = check(rows, *keep)
    assert code == 0
    assert out[0].startswith(f"kept: d.jsonl line 2  {problem}")
    assert out[2].lstrip().startswith("1 row kept: turn [2], call of 'g': calls a tool that")
    assert out[2].endswith("(line 2)")
    assert out[-2:] == ["No bad rows.", KEPT]
    code, out, _ = check(rows, *keep[:2])
    assert code == 2
    assert out[0].startswith(f"d.jsonl line 2  {problem}") and "1 row lost" in out[2]


def test_data_of_which_nothing_can_be_read_are_reported_before_the_model_is(check, tmp_path):
    wrong = ("--set", "pretrained_model_name_or_path=./no_model")
    code, _, err = check([chat("Hi", "Hello")], "--set", "data_path=no.csv", *wrong)
    assert code == 2 and err.startswith("DataError: data_path 'no.csv': no such file")
    code, _, err = check([chat("Hi", "Hello")], *wrong)
    assert code == 2 and "no_model': no such folder" in err
