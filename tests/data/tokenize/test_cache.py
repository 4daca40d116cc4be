import json
import threading

import numpy as np
import pytest
import torch
from data_makers import build_data, chats, lines_of, template, tokenizer, write_jsonl

from xtuner.data.images.feature_store import FeatureStore
from xtuner.data.tokenize import cache
from xtuner.data.tokenize.faults import KEPT_FAULTS, FaultGroup
from xtuner.data.tokenize.store import RowStore
from xtuner.data.tokenize.workers import encode_chunk
from xtuner.errors import DataError
from xtuner.testing.tiny import tiny_tokenizer


class Counting:
    """A template that counts the conversations it encodes."""

    def __init__(self, fingerprint="counting"):
        self.count = 0
        self._fingerprint = fingerprint

    def sequences(self, conversation):
        self.count += 1
        return template().sequences(conversation)

    def encode(self, conversation):
        (encoded,) = self.sequences(conversation)
        return encoded

    def fingerprint(self):
        return self._fingerprint


def encoded_rows(path, *, fingerprint="counting", **changes):
    """How many rows a build has to encode."""
    own = Counting(fingerprint)
    build_data(path, own_template=own, dataset_num_proc=1, **changes)
    return own.count


@pytest.fixture
def path(tmp_path):
    return write_jsonl(tmp_path / "d.jsonl", chats(12))


def test_a_second_build_encodes_nothing(path):
    assert encoded_rows(path) == 12
    assert encoded_rows(path) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 64},
        {"pack_to_max_length": False},
        {"seed": 5},
        {"validation_ratio": 0.3},
        {"dataset_format": ("openai",)},
    ],
)
def test_settings_that_act_on_encoded_rows_do_not_encode_again(path, changes):
    assert encoded_rows(path) == 12
    assert encoded_rows(path, **changes) == 0


def test_another_place_of_the_same_rows_uses_them_but_names_its_own(path, tmp_path):
    assert encoded_rows(path) == 12
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    assert encoded_rows(copy) == 0
    train = build_data(copy, own_template=Counting()).train
    assert train[0][0].row.source == str(copy)


def test_new_content_is_encoded(path):
    assert encoded_rows(path) == 12
    write_jsonl(path, chats(13))
    assert encoded_rows(path) == 13


def test_a_new_template_or_purpose_is_encoded(path):
    assert encoded_rows(path) == 12
    assert encoded_rows(path, fingerprint="other") == 12
    assert encoded_rows(path, algorithm="pretrain") == 12


def test_changed_user_format_is_encoded_again(path, tmp_path):
    own = tmp_path / "mine.py"
    own.write_text("def read(row):\n    return row['messages']\n")
    options = {"dataset_format": ("mine.py:read",), "folder": tmp_path}
    assert encoded_rows(path, **options) == 12
    assert encoded_rows(path, **options) == 0
    own.write_text("def read(row):\n    return row['messages']  # changed\n")
    assert encoded_rows(path, **options) == 12


def test_the_identity_of_a_tokenizer_is_what_it_does():
    same, other = tiny_tokenizer(), tiny_tokenizer()
    same(["a", "bb"], padding=True, truncation=True, max_length=4)
    other.add_tokens(["<extra>"])
    assert cache.tokenizer_identity(same) == cache.tokenizer_identity(tokenizer())
    assert cache.tokenizer_identity(other) != cache.tokenizer_identity(tokenizer())


def stores():
    return [p for p in cache.cache_root().iterdir() if p.is_dir()]


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def remove(path):
    path.unlink()


def scramble(path):
    path.write_text("{not json")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("token_ids.npy", cut),
        ("offsets.npy", cut),
        ("hashes.npy", remove),
        ("about.json", remove),
        ("about.json", scramble),
        ("about.json", cut),
        ("lines.npy", scramble),
    ],
)
def test_damaged_store_is_recreated(path, name, damage):
    own = Counting()
    before = lines_of(build_data(path, own_template=own).train)
    (store,) = stores()
    damage(store / name)
    assert encoded_rows(path) == 12
    assert lines_of(build_data(path, own_template=own).train) == before


def test_an_interrupted_build_leaves_nothing_that_could_be_used(path):
    class Interrupting(Counting):
        def sequences(self, conversation):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_data(path, own_template=Interrupting(), dataset_num_proc=1)
    assert stores() == []
    assert encoded_rows(path) == 12


def test_left_overs_of_a_killed_build_are_removed(path):
    encoded_rows(path)
    (store,) = stores()
    left_over = store.with_name(f"{store.name}.tmpabc")
    store.rename(left_over)
    assert encoded_rows(path) == 12
    assert stores() == [store]


def test_builds_at_the_same_time_encode_once(path):
    own = Counting()
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(
                lines_of(build_data(path, own_template=own, dataset_num_proc=1).train)
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert own.count == 12
    assert len(found) == 4
    assert len({tuple(lines) for lines in found}) == 1


def test_without_locks_the_first_to_finish_wins(path, monkeypatch):
    import fcntl

    def refuse(*args):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)

    class Overtaken(Counting):
        """Another process finishes while this one encodes."""

        def sequences(self, conversation):
            if not self.count:
                assert encoded_rows(path) == 12
            return super().sequences(conversation)

    train = build_data(path, own_template=Overtaken(), dataset_num_proc=1).train
    assert train.num_samples == 12
    assert len(stores()) == 1


def test_a_cache_below_a_file_is_an_error_with_a_hint(path, monkeypatch):
    monkeypatch.setenv("XTUNER_CACHE", str(path))
    with pytest.raises(DataError, match="XTUNER_CACHE"):
        build_data(path)


def test_the_cache_is_below_the_home_unless_it_is_set(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XTUNER_CACHE")
    assert cache.cache_root() == tmp_path / ".cache/xtuner/datasets"


def test_a_store_without_a_row_can_be_opened(tmp_path):
    from test_workers import encoder, task

    rows = [task({"messages": "no"}, line=n) for n in range(1, 31)]
    store = cache.load_or_make(
        "k", file_names=["d"], make=lambda writer: writer.append(encode_chunk(encoder(), rows))
    )
    assert (len(store), store.rows_read) == (0, 30)
    (group,) = store.faults
    assert group.count == 30
    assert [row.line for row in group.first] == list(range(1, KEPT_FAULTS + 1))


def test_reasons_that_differ_in_quoted_words_are_one_group():
    from xtuner.data.sources.rows import Fault
    from xtuner.data.tokenize.faults import BadRow

    group = FaultGroup(Fault("is 'bot'; it must be 'user'", "messages[0].role").words)
    for i, role in enumerate(("bot", "bot", "me")):
        group.add(BadRow(0, i, Fault(f"is '{role}'; it must be 'user'", f"messages[{i}].role")))
    assert group.what == "messages[].role: is '...'; it must be 'user'"
    assert group.count == 3


def test_no_end_of_reasons_is_kept(tmp_path):
    from test_workers import encoder

    from xtuner.data.sources.rows import Fault
    from xtuner.data.tokenize.faults import BadRow
    from xtuner.data.tokenize.store import StoreWriter

    writer = StoreWriter(tmp_path)
    chunk = encode_chunk(encoder(), [])
    chunk.faults = [BadRow(0, n, Fault(f"reason {n}")) for n in range(500)]
    writer.append(chunk)
    writer.finish()
    groups = RowStore(tmp_path, key="k", file_names=["d"]).faults
    assert sum(group.count for group in groups) == 500
    assert len(groups) == 101
    assert groups[0].what == "has another fault"
    assert str(groups[0].first[0].fault) == "reason 100"


def test_the_arrays_are_plain_numpy_files(path):
    train = build_data(path, own_template=Counting(), pack_to_max_length=False, shuffle=False).train
    (store,) = stores()
    ids, offsets = (np.load(store / f"{name}.npy") for name in ("token_ids", "offsets"))
    assert (ids.dtype, len(offsets)) == (np.int32, 13)
    assert ids[offsets[3] : offsets[4]].tolist() == train[3][0].input_ids.tolist()
    assert json.loads((store / "about.json").read_text())["rows_read"] == 12


def test_the_cache_of_another_user_is_not_used(tmp_path, monkeypatch):
    folder = tmp_path / "datasets"
    folder.mkdir()
    folder.chmod(0o775)  # as a umask of 002 makes it
    cache.own_folder(folder)
    assert not folder.stat().st_mode & 0o022
    monkeypatch.setattr("os.getuid", lambda: folder.stat().st_uid + 1)
    if folder.stat().st_uid:
        with pytest.raises(PermissionError, match="another folder with XTUNER_CACHE"):
            cache.own_folder(folder)
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="would be trained on"):
        cache.own_folder(folder)


def test_features_of_another_user_are_not_used(monkeypatch, caplog):
    def opened():
        store = FeatureStore()
        store.open({"model": "m"}, shape=(2, 3))
        return store

    opened().write("key", torch.ones(2, 3))
    assert torch.equal(opened().read("key"), torch.ones(2, 3))

    def refuse(path, **how):
        raise PermissionError(f"other users can write to {path}")

    monkeypatch.setattr(cache, "refuse_others", refuse)
    assert not caplog.records
    assert opened().read("key") is None
    assert "belongs to another user" in caplog.text
