import builtins
import gzip
import json
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
from data_makers import chat, write_jsonl

from xtuner.data.sources.find import find
from xtuner.data.sources.rows import Fault, parse
from xtuner.errors import DataError

ROWS = [{"question": "a", "n": "1"}, {"question": 'two\n"lines", ü', "n": "2"}]


def read(path, **options):
    """(line, row or fault) of every row of a source."""
    source = find(str(path), folder=path.parent, **options)
    return [
        (raw.line, parse(raw.value) if isinstance(raw.value, bytes) else raw.value)
        for file in source.files
        for raw in file.rows()
    ]


def faults(path):
    return {line: str(row) for line, row in read(path) if isinstance(row, Fault)}


def as_json(path):
    path.write_text(json.dumps(ROWS, indent=1))


def as_lines(path):
    path.write_text("\n".join(json.dumps(row) for row in ROWS))


def as_csv(path):
    path.write_text('question,n\na,1\n"two\n""lines"", ü",2\n')


def as_tsv(path):
    path.write_text('question\tn\na\t1\n"two\n""lines"", ü"\t2\n')


def as_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "write", "numbers"),
    [
        ("d.json", as_json, [1, 2]),
        ("d.json", as_lines, [1, 2]),
        ("d.jsonl", as_lines, [1, 2]),
        ("D.JSONL", as_lines, [1, 2]),
        ("d.jsonl", as_json, [1, 2]),
        ("d.csv", as_csv, [2, 3]),
        ("d.tsv", as_tsv, [2, 3]),
        ("d.parquet", as_parquet, [1, 2]),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, write, numbers):
    path = tmp_path / name
    write(path)
    assert read(path) == list(zip(numbers, ROWS, strict=True))
    if not name.endswith("parquet"):
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        assert read(packed) == read(path)


def test_a_text_file_is_one_document(tmp_path):
    (path := tmp_path / "d.txt").write_text("one\n\ntwo\n")
    assert read(path) == [(1, {"text": "one\n\ntwo\n"})]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.txt", "d.tsv"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\n\r\n \t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n\n"],
    ids=["empty", "blank", "mark", "mark and blank"],
)
def test_a_file_without_rows_gives_none(tmp_path, name, content):
    (path := tmp_path / name).write_bytes(content)
    assert read(path) == []


def test_a_header_alone_and_an_empty_array_give_no_rows(tmp_path):
    (tmp_path / "d.csv").write_text("a,b\n")
    (tmp_path / "d.json").write_text(" [ ]\n")
    assert read(tmp_path / "d.csv") == read(tmp_path / "d.json") == []


def test_byte_order_mark_and_crlf_do_not_matter(tmp_path):
    for name, text in {
        "d.jsonl": '{"a": 1}\r\n\r\n{"a": 2}\r\n',
        "d.json": '[{"a": 1},\r\n{"a": 2}]\r\n',
        "d.csv": "a\r\n1\r\n2\r\n",
    }.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert [str(row["a"]) for _, row in read(tmp_path / name)] == ["1", "2"], name


def test_broken_lines_are_named_and_the_rest_is_read(tmp_path):
    path = tmp_path / "d.jsonl"
    good = b'{"a": 1}'
    lines = [good, b'{"a": 1,}', b"", b"[1]", b"null", b"\0\0", b'{"a": "\xff"}', good]
    path.write_bytes(b"\n".join(lines))
    assert faults(path) == {
        2: "is not valid JSON (column 9: Illegal trailing comma before end of object)"
        if sys.version_info >= (3, 13)
        else "is not valid JSON (column 9: Expecting property name enclosed in double quotes)",
        4: "must be a JSON object, {...}, but is an array",
        5: "must be a JSON object, {...}, but is null",
        6: "is not valid JSON (column 1: Expecting value)",
        7: "is not UTF-8 text; save the file as UTF-8 (byte 8 of the line)",
    }
    assert [line for line, row in read(path) if row == {"a": 1}] == [1, 8]


def test_values_that_no_parser_survives_are_faults(tmp_path):
    lines = [
        '{"a": ' + "[" * 100_000 + "}",
        '{"a": ' + "9" * 5000 + "}",
        r'{"a": "\ud83d"}',
        r'{"a": "\ud83d\ude00"}',
    ]
    (path := tmp_path / "d.jsonl").write_text("\n".join(lines))
    found = faults(path)
    assert set(found) == {1, 2, 3}
    assert "unpaired surrogate" in found[3]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_that_wraps_the_rows_is_read(tmp_path, name, indent):
    rows = [{"a": 1, "data": []}, {"a": 2}]
    for wrapped in ({"version": "1", "data": rows, "n": 2}, {"data": rows}):
        (tmp_path / name).write_text(json.dumps(wrapped, indent=indent))
        assert read(tmp_path / name) == list(enumerate(rows, 1))


def test_lines_whose_objects_have_such_a_key_are_lines(tmp_path):
    rows = [{"data": [{"a": 1}]}, {"data": [{"a": 2}]}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert read(tmp_path / "d.jsonl") == list(enumerate(rows, 1))


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.jsonl.gz"])
def test_objects_over_several_lines_are_read(tmp_path, name):
    rows = [{"a": {"b": [1, 2]}}, {"a": 2}, {"a": 3}]
    text = "\n".join(json.dumps(row, indent=2) for row in rows).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert read(tmp_path / name) == list(enumerate(rows, 1))
    (tmp_path / "e.json").write_text('{\n "a": 1\n}\n{\n "a" 2\n}')
    with pytest.raises(DataError, match=r"e\.json line 5 column 6: is not valid JSON"):
        read(tmp_path / "e.json")


def test_nan_is_an_empty_cell(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"a": NaN, "b": "NaN"}\n')
    (tmp_path / "d.json").write_text('[{"a": NaN, "b": "NaN"}]')
    for name in ("d.jsonl", "d.json"):
        assert read(tmp_path / name) == [(1, {"a": None, "b": "NaN"})]


def save_to_disk(folder, rows, *, files=2):
    """What `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{files:05}.arrow" for n in range(files)]
    for number, name in enumerate(names):
        table = pyarrow.Table.from_pylist(rows[number::files])
        with pyarrow.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_indices_data_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_data_set_is_read_by_split(tmp_path):
    rows = [{"a": str(n)} for n in range(200)]
    save_to_disk(tmp_path / "d" / "train", rows)
    save_to_disk(tmp_path / "d" / "test", rows[:2], files=1)
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [row for _, row in read(tmp_path / "d")] == rows[::2] + rows[1::2]
    assert [row for _, row in read(tmp_path / "d" / "test")] == rows[:2]
    assert [row for _, row in read(tmp_path / "d", split="test")] == rows[:2]
    with pytest.raises(
        DataError, match=r"without the split 'tset'; .* one of train, test; did you"
    ):
        read(tmp_path / "d", split="tset")
    (tmp_path / "d" / "test" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"lacks data-00000-of-00001\.arrow; save it again"):
        read(tmp_path / "d", split="test")


def test_an_arrow_file_is_read_in_both_of_its_formats(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    for name, writer in (("s.arrow", pyarrow.ipc.new_stream), ("f.arrow", pyarrow.ipc.new_file)):
        with writer(tmp_path / name, table.schema) as file:
            file.write_table(table)
        assert read(tmp_path / name) == list(enumerate(ROWS, 1))
    (tmp_path / "s.arrow").write_bytes((tmp_path / "s.arrow").read_bytes()[:40])
    with pytest.raises(DataError, match=r"s\.arrow: is not a complete arrow file"):
        read(tmp_path / "s.arrow")


def test_a_huge_line_is_read(tmp_path):
    (path := tmp_path / "d.jsonl").write_text(json.dumps({"text": "x" * 10_000_000}))
    assert len(read(path)[0][1]["text"]) == 10_000_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a" 2}]', r"line 2 column 7: .* expecting ':' delimiter"),
        ('[{"a": 1}\n {"a": 2}]', r"line 2 column 2: .* expecting ',' and the next row, or '\]'"),
        ('[{"a": 1}', r"line 1 column 10: .* expecting ','"),
        ('[{"a": 1}]\n[{"a": 2}]', r"line 2 column 1: .*extra data after the '\]'"),
    ],
)
def test_broken_array_is_reported_with_its_position(tmp_path, text, message):
    (path := tmp_path / "d.json").write_text(text)
    with pytest.raises(DataError, match="(?i)" + message):
        read(path)


def test_an_element_that_is_no_object_is_a_fault(tmp_path):
    (path := tmp_path / "d.json").write_text('[{"a": 1}, 3, {"a": 2}]')
    assert faults(path) == {2: "must be a JSON object, {...}, but is a number"}


def test_broken_table_rows_are_named_by_the_line_where_they_begin(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes(b'a,b\n1,2\n"x\ny",2,3\n\n4\n5,\xff\n6,7\0\n"8"x,9\n10,11\n"open,\n12,13\n')
    found = faults(path)
    assert list(found) == [3, 6, 7, 8, 9, 11]
    assert found[3] == "must have as many cells as the header, 2 (it has 3)"
    assert "UTF-8" in found[7] and "NUL" in found[8] and "not valid CSV" in found[9]
    assert found[11] == "opens a quote that is never closed, so all following lines are lost"
    assert [row["a"] for _, row in read(path) if isinstance(row, dict)] == ["1", "10"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", b"a,b,a\n1,2,3\n", "line 1: duplicate columns in the header: a"),
        (
            "d.csv",
            "问题,回答\n".encode("gbk"),
            r"(?s)is not UTF-8.*'CSV UTF-8'.*columns are '问题,回答'.*d\.csv > .*d_utf8\.csv$",
        ),
        ("d.csv", b"gr\xfc\xdfe,\xff\n", "line 1: is not UTF-8.*'CSV UTF-8'"),
        ("d.json", b'[{"a": "\xff"}]', "line 1: is not UTF-8"),
        ("d.jsonl", '{"a": 1}'.encode("utf-16"), "is UTF-16"),
        ("d.jsonl.gz", b"not packed", "not a complete gzip file"),
        ("d.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "not a complete gzip file"),
        ("d.parquet", b"PAR1 no", "not a complete parquet file"),
        ("d.parquet", b"", "not a complete parquet file"),
        ("d.docx", b"", "must end in one of .json, .jsonl"),
    ],
    ids=[
        "header",
        "gbk header",
        "latin header",
        "utf-8",
        "utf-16",
        "gzip",
        "cut gzip",
        "parquet",
        "empty parquet",
        "docx",
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, message):
    (path := tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert name in str(caught.value)


def test_binary_and_foreign_text_are_faults(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\0b")
    (tmp_path / "b.txt").write_bytes("Grüße".encode("latin-1"))
    assert "NUL" in faults(tmp_path / "a.txt")[1]
    assert faults(tmp_path / "b.txt")[1] == "is not UTF-8 text; save the file as UTF-8 (byte 3)"


def test_a_folder_is_read_in_order_without_hidden_files(tmp_path):
    for name in ("b/2.jsonl", "a.jsonl", "b/1.json", ".hidden/x.jsonl", "c.jsonl.gz", "b/.x.jsonl"):
        path = tmp_path / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"name": name})
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    (tmp_path / "d" / "README.md").write_text("no data")
    source = find("d", folder=tmp_path)
    assert [file.name for file in source.files] == [
        "d/a.jsonl",
        "d/c.jsonl.gz",
        "d/b/1.json",
        "d/b/2.jsonl",
    ]


def test_reports_of_runs_in_a_folder_are_no_data(tmp_path):
    for name, mark in (("work", "run.lock"), ("work/iter_3", "run.yaml"), ("old", "run.lock")):
        (tmp_path / name).mkdir()
        (tmp_path / name / mark).write_text("")
        write_jsonl(tmp_path / name / "report.jsonl", [{"rows": 3}])
    write_jsonl(tmp_path / "mine.jsonl", [{"text": "a"}])
    assert [file.name for file in find(".", folder=tmp_path).files] == ["mine.jsonl"]
    assert len(find("old", folder=tmp_path).files) == 1, "a folder that is named is read"


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match="the folder contains no data files"):
        find("d", folder=tmp_path)


def test_paths_are_relative_to_the_settings_then_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_jsonl(tmp_path / "here" / "d.jsonl", [chat("q", "here")])
    assert next(find("d.jsonl", folder=tmp_path).files[0].rows()).value.count(b"here")
    write_jsonl(tmp_path / "d.jsonl", [chat("q", "beside")])
    assert next(find("d.jsonl", folder=tmp_path).files[0].rows()).value.count(b"beside")


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [])
    with pytest.raises(DataError, match=r"no such file or folder .* did you mean 'train.jsonl'"):
        find("trian.jsonl", folder=tmp_path)
    for name in ("./data", "a/b/c", "~/data"):
        with pytest.raises(DataError, match="no such file or folder"):
            find(name, folder=tmp_path)


def fake_datasets(monkeypatch, **parts):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(**parts))


class Table(list):
    _fingerprint = "abc"
    info = types.SimpleNamespace(size_in_bytes=100)


def test_a_hub_name_is_read_with_datasets(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, configuration, *, split):
        asked.append((name, configuration, split))
        return Table(ROWS)

    fake_datasets(monkeypatch, load_dataset=load_dataset)
    source = find("owner/name:small", folder=tmp_path, split="test")
    (file,) = source.files
    assert asked == [("owner/name", "small", "test")]
    assert [(raw.line, raw.value) for raw in file.rows()] == list(enumerate(ROWS, 1))
    assert (file.digest(), file.size, file.unit) == ("abc", 100, "row")
    nested = Table([{"turns": [{"role": "user", "calls": None, "at": {"x": 1, "y": None}}]}])
    fake_datasets(monkeypatch, load_dataset=lambda *_, **__: nested)
    (file,) = find("owner/name", folder=tmp_path).files
    (raw,) = file.rows()
    assert raw.value == {"turns": [{"role": "user", "at": {"x": 1}}]}


def test_without_datasets_the_hint_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=r"pip install 'xtuner\[hub\]'"):
        find("owner/name", folder=tmp_path)


def test_unreachable_hub_is_reported(tmp_path, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/name'\nmore")

    fake_datasets(monkeypatch, load_dataset=load_dataset)
    with pytest.raises(DataError, match=r"neither a local path nor .*: Couldn't reach .*name'$"):
        find("owner/name", folder=tmp_path)


def test_a_wrong_split_names_those_there_are(tmp_path, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ValueError('Unknown split "trian". Should be one of [...].')

    fake_datasets(
        monkeypatch,
        load_dataset=load_dataset,
        get_dataset_split_names=lambda name, configuration: ["train", "test"],
    )
    with pytest.raises(DataError, match="one of train, test; did you mean 'train'"):
        find("owner/name", folder=tmp_path, split="trian")
