import gzip
import io
import itertools
import json
import tracemalloc

import pytest
from test_find import read

from xtuner.data.sources import json_arrays
from xtuner.data.sources.find import find
from xtuner.data.sources.json_arrays import json_rows
from xtuner.errors import DataError

WHOLE = """ [ {"a": [1, -2.5e+3, true, null], "b": "ü \\u00fc \\ud83d\\ude00 😀 \\n"},
 12345, -0.5E-7, NaN, -Infinity,"\\\\",
\t{"c": {"d": "中文", "e": []}} , {"f": "\\ud800"}, false ]\r\n """


def outcome(raw):
    """The rows of an array, and how reading it ended."""
    rows = []
    try:
        for row in json_rows(io.BytesIO(raw), "array", name="d.json"):
            rows.append(repr(row))
    except DataError as error:
        return rows, str(error)
    return rows, ""


def at_once(raw, monkeypatch):
    monkeypatch.setattr(json_arrays, "BLOCK", 1 << 20)
    return outcome(raw)


def broken_texts():
    """The array cut at every position, and with every character replaced by an invalid one."""
    raw = WHOLE.encode()
    start = raw.index(b"[") + 1
    yield from (raw[:size] for size in range(start, len(raw)))
    for wrong, at in itertools.product((b"]", b'"', b"\xff", b"x\n"), range(start, len(raw))):
        yield raw[:at] + wrong + raw[at + 1 :]


@pytest.mark.parametrize("stretch", [1, 2, 3, 7, 64])
def test_block_boundaries_do_not_matter(monkeypatch, stretch):
    for raw in (WHOLE.encode(), b"\xef\xbb\xbf" + WHOLE.encode()):
        rows, error = at_once(raw, monkeypatch)
        assert (len(rows), error) == (9, "")
        monkeypatch.setattr(json_arrays, "BLOCK", stretch)
        assert outcome(raw) == (rows, error)


@pytest.mark.parametrize("stretch", [1, 5, 16])
def test_error_position_does_not_depend_on_block_boundaries(monkeypatch, stretch):
    for raw in broken_texts():
        rows, error = at_once(raw, monkeypatch)
        monkeypatch.setattr(json_arrays, "BLOCK", stretch)
        parted, parted_error = outcome(raw)
        assert parted_error == error
        # if bytes are not text, only what precedes them gives rows
        assert parted == rows or ("UTF-8" in error and parted[: len(rows)] == rows)


def test_error_has_line_and_column_of_the_file(monkeypatch):
    monkeypatch.setattr(json_arrays, "BLOCK", 50)
    lines = ["[", *(f' {{"n": {n}}},' for n in range(1000)), '  {"n": "ü"}, {"n" 1000}]']
    _, error = outcome("\n".join(lines).encode())
    assert error.startswith("d.json line 1002 column 20: is not valid JSON: Expecting ':'")
    one_line = "[" + '{"n": 1}, ' * 1000 + '{"n": oops}]'
    assert "line 1 column 10008: " in outcome(one_line.encode())[1]


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000])
def test_unparsable_value_ends_the_array_with_its_position(value):
    rows, error = outcome(f'[{{"a": 1}},\n {value}]'.encode())
    assert len(rows) == 1
    assert error.startswith("d.json line 2 column 2: is not valid JSON: ")


def test_large_array_is_never_entirely_in_memory(tmp_path):
    row = json.dumps({"text": "😀" + "x" * 1000}, ensure_ascii=False)
    raw = ("[" + ",\n".join([row] * 20_000) + "]").encode()
    tracemalloc.start()
    try:
        assert sum(1 for _ in json_rows(io.BytesIO(raw), "array", name="d")) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * json_arrays.BLOCK < len(raw)


def test_the_first_rows_are_had_without_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(json_arrays, "BLOCK", 4096)
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"n": n} for n in range(100_000)]))
    (file,) = find(str(path), folder=tmp_path).files
    ends = [row.end for row in itertools.islice(file.rows(), 100)]
    assert ends[-1] <= 4096
    assert list(file.rows())[-1].end == path.stat().st_size
    packed = tmp_path / "d.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(packed) == read(path)


def test_a_row_of_many_stretches_is_read(monkeypatch):
    monkeypatch.setattr(json_arrays, "BLOCK", 10)
    rows = [{"text": "x" * 100_000}, {"text": "y"}]
    assert list(json_rows(io.BytesIO(json.dumps(rows).encode()), "array", name="d")) == rows
