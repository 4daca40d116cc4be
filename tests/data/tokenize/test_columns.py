import threading
from pathlib import Path

import numpy as np
import pytest
from data_makers import build_data, chats, lines_of, write_jsonl

from xtuner.data.tokenize import columns
from xtuner.data.tokenize.columns import Column, ColumnWriter

INT = np.dtype("<i4")


@pytest.fixture
def path(tmp_path):
    writer = ColumnWriter(tmp_path / "c.npy", INT)
    for part in np.array_split(np.arange(1000), 7):
        writer.append(part)
    assert writer.close() == 1000
    return tmp_path / "c.npy"


@pytest.mark.parametrize("held", [0, 5])
@pytest.mark.parametrize("anywhere", [True, False])
def test_any_part_can_be_read(path, monkeypatch, held, anywhere):
    monkeypatch.setattr(columns, "MAX_OPEN", held)
    monkeypatch.setattr(columns, "_open_columns", set())
    monkeypatch.setattr(columns, "_HAS_PREAD", anywhere)
    column = Column(path, INT)
    assert column.read().tolist() == np.load(path).tolist() == list(range(1000))
    assert column.read(998).tolist() == column.read(998, 5).tolist() == [998, 999]
    assert column.read(3, 2).tolist() == [3, 4]
    assert column.read(1000).tolist() == column.read(5, 0).tolist() == []


def test_threads_do_not_disturb_each_other_without_pread(path, monkeypatch):
    monkeypatch.setattr(columns, "_HAS_PREAD", False)
    column, wrong = Column(path, INT), []

    def look(start):
        for place in range(start, 1000, 4):
            if column.read(place, 1).tolist() != [place]:
                wrong.append(place)

    threads = [threading.Thread(target=look, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_file_is_closed_with_its_column(path):
    column = Column(path, INT)
    file = column._file
    del column
    assert file.closed


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:60]),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: np.save(path, np.zeros(3)),
        lambda path: np.save(path, np.zeros((3, 3), INT)),
    ],
)
def test_a_damaged_file_is_refused(path, damage):
    damage(path)
    with pytest.raises(ValueError, match=r"c\.npy"):
        Column(path, INT)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_encoded_rows_are_not_mapped(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("XTUNER_CACHE", str(cache))
    train = build_data(write_jsonl(tmp_path / "d.jsonl", chats(50))).train
    assert sorted(lines_of(train)) == list(range(1, 51))
    # pages of a mapped file would count as memory of the run, and grow with every step
    assert str(cache) not in Path("/proc/self/maps").read_text()
