"""Malformed parquet files fail a row or are reported; they never end the process."""

import datetime
import decimal
import itertools
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from xtuner.data.sources.parquet import _Child, _end_all, parquet_rows
from xtuner.data.sources.rows import Fault
from xtuner.errors import DataError

CASES = Path(__file__).parents[2] / "cases" / "parquet"


@pytest.mark.parametrize(
    ("file", "column", "words"),
    [
        ("p_date32_text.parquet", "text", "cannot be read.*date32"),
        ("p_dur_id_text.parquet", "id", "cannot be read.*duration"),
        ("pn58.parquet", "id", "cannot be read.*timestamp"),
        ("pn47.parquet", "text", "is not UTF-8"),
    ],
)
def test_value_that_python_cannot_represent_fails_its_row(file, column, words) -> None:
    rows = [row for row, _ in parquet_rows(CASES / file, name=file)]
    faults = [row for row in rows if isinstance(row, Fault)]
    assert faults and all(fault.field == column for fault in faults)
    assert len(rows) == 2
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(str(faults[0]))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pm214.parquet", r"pm214\.parquet: is malformed: .* ended \(SIGABRT\)"),
        ("pn168.parquet", "is not a complete parquet file: .*codec"),
    ],
)
def test_a_malformed_file_is_named_and_the_next_one_read(file, words, tmp_path) -> None:
    with pytest.raises(DataError, match=words):
        list(parquet_rows(CASES / file, name=file))
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "a.parquet")
    assert [row for row, _ in parquet_rows(tmp_path / "a.parquet", name="a")] == [{"a": 1}]


def test_valid_values_equal_those_of_pyarrow(tmp_path) -> None:
    zone = datetime.timezone(datetime.timedelta(hours=2))
    values = {
        "text": ["a", "ü\0", None],
        "bytes": [b"\xff", b"", None],
        "number": [1, 2**62, None],
        "list": [[{"role": "user", "n": 1.5}], [], None],
        "date": [datetime.date(2020, 1, 2), datetime.date(1, 1, 1), None],
        "time": [datetime.datetime(2020, 1, 2, 3), datetime.datetime(1970, 1, 1), None],
        "zoned": [datetime.datetime(2020, 1, 2, tzinfo=zone)] * 2 + [None],
        "money": [decimal.Decimal("1.50"), decimal.Decimal(0), None],
        "for": [datetime.timedelta(1), datetime.timedelta(0), None],
    }
    table = pyarrow.table({name: column * 50 for name, column in values.items()})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    found = list(parquet_rows(tmp_path / "t.parquet", name="t"))
    expected = table.to_pylist()
    for row in expected:  # the time zone's class is pyarrow's
        row["zoned"] = row["zoned"] and str(row["zoned"])
    rows = [{**row, "zoned": row["zoned"] and str(row["zoned"])} for row, _ in found]
    assert rows == expected
    assert found[-1][1] == 1.0


def test_one_process_reads_several_files(tmp_path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"a": list(range(300))}), tmp_path / "a.parquet")
    _end_all()
    for _ in range(3):
        assert len(list(parquet_rows(tmp_path / "a.parquet", name="a"))) == 300
    assert len(_Child._idle) <= 1
    some = list(itertools.islice(parquet_rows(tmp_path / "a.parquet", name="a"), 100))
    assert [row["a"] for row, _ in some] == list(range(100))


@pytest.mark.parametrize("dictionary", [True, False], ids=["dictionary", "plain"])
def test_a_file_that_expands_beyond_all_measure_is_refused(dictionary, tmp_path) -> None:
    file = tmp_path / "bomb.parquet"
    table = pyarrow.table({"text": pyarrow.array(["a" * 100_000] * 700)})
    pyarrow.parquet.write_table(table, file, compression="zstd", use_dictionary=dictionary)
    with pytest.raises(DataError, match=r"it expands from 0\.\d+ MB to (64|70) MB or more"):
        for _ in parquet_rows(file, name=file.name):
            pass
