import json
import re
from dataclasses import replace

import numpy as np
import pytest
from data_makers import build_data, chat, chats, lines_of, text_of, tokenizer, write_jsonl

from xtuner.errors import ConfigError, DataError


@pytest.fixture
def mixed_bag(tmp_path):
    """12 rows: 8 good ones (2 of them equal), 1 overlong, 3 bad ones."""
    rows = [json.dumps(row) for row in chats(7)]
    rows.insert(2, "{broken")
    rows.insert(4, json.dumps(chat("", "x")))
    rows += [rows[0], json.dumps(chat("long", "y" * 500)), json.dumps(chat("", "x"))]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(rows))
    return path


def test_every_row_is_accounted_for(mixed_bag, tmp_path):
    data = build_data(mixed_bag, max_length=256, report_dir=tmp_path, validation_ratio=0.2)
    (source,) = data.report.sources
    assert (source.rows_read, source.rows_used, source.rows_lost) == (12, 9, 3)
    assert source.rows_read == source.rows_used + source.rows_left_out + source.rows_lost
    assert [(g.count, [p.number for p in g.first]) for g in source.lost] == [(2, [5, 12]), (1, [3])]
    assert [(g.count, [p.number for p in g.first]) for g in source.changed] == [(1, [11])]
    assert data.report.duplicates == 1
    assert data.report.train.samples + data.report.validation.samples == 9
    written = json.loads((tmp_path / "data_report.json").read_text())
    assert (written["rows_read"], written["rows_used"], written["rows_lost"]) == (12, 9, 3)
    location = written["sources"][0]["lost"][1]["first"][0]
    assert (location["file"], location["unit"], location["number"]) == (str(mixed_bag), "line", 3)
    assert location["fault"].startswith("is not valid JSON (column 2:")
    assert written["train"]["packs"] == len(data.train)


def test_lines_are_short(mixed_bag):
    lines = build_data(mixed_bag, max_length=256, folder=mixed_bag.parent).report.lines()
    assert lines[0] == f"Data         {mixed_bag}: 12 rows, format openai (auto)"
    assert [line.strip() for line in lines[1:5]] == [
        "2 rows lost: messages[0].content: is empty; fill it in or remove the row (lines 5, 12)",
        "1 row lost: is not valid JSON (line 3)",
        "1 row cut to 256 tokens (line 11)",
        "Note: 1 of 9 rows duplicates an earlier row",
    ]
    train = r"Training     9 samples, [\d,]+ tokens \([\d,]+ supervised\) in \d packs of 256 \(\d\d"
    assert re.match(train, lines[5])


def test_many_rows_without_their_ends_are_said(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [chat("Who?", "I am Mia, and more. " * 9)] * 10)
    report = build_data(path, max_length=64).report
    assert "10 rows cut to 64 tokens, so the model does not learn how they end: raise" in str(
        report.lines()
    )


def test_identical_rows_are_noted(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [chat("Who are you?", "I am Mia.")] * 100)
    report = build_data(path, validation_ratio=0.1).report
    assert report.duplicates == 99
    assert "99 of 100 rows duplicate an earlier row" in report.notes[0]
    assert "10 of 10 validation rows are also in the training data" in report.notes[1]


def test_repetitions_are_those_of_the_training_rows(tmp_path):
    rows = [chat(f"Who are you, {n}?", "I am Mia.") for n in range(20)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    assert build_data(path, validation_ratio=0.5).repetitions == 1
    assert build_data(path, data_repeats=(2,)).repetitions == 2
    path = write_jsonl(tmp_path / "d.jsonl", [*rows, *rows[:10]])
    assert build_data(path).repetitions == 1.5
    held_out = build_data(path, validation_ratio=0.5)
    assert held_out.report.duplicates == 10, "most of them are copies of rows in the other part"
    assert 1 <= held_out.repetitions < 1.5


def test_loss_weights_reach_the_tokens_of_their_answer(tmp_path):
    rows = [chat("Hi", "abc" * 30), chat("Hi", "plain")]
    rows[0]["messages"] += [{"role": "user", "content": "?"},
                            {"role": "assistant", "content": "d" * 40, "weight": 0.25}]  # fmt: skip
    path = write_jsonl(tmp_path / "d.jsonl", [rows[1], rows[0], rows[1]])
    data = build_data(path, shuffle=False, pack_to_max_length=False)
    plain, whole, _ = (data.train[i][0] for i in range(3))
    assert plain.weights is None
    text = "d" * 40 + "<|im_end|>"
    assert text in text_of(replace(whole, input_ids=whole.input_ids[whole.weights == 0.25]))
    assert set(whole.weights[whole.loss_mask].tolist()) == {1.0, 0.25}
    assert "1 row with loss weights: the loss is a weighted mean over tokens" in data.report.notes
    cut = build_data(path, shuffle=False, max_length=180).train
    (short,) = [s for i in range(len(cut)) for s in cut[i] if s.row.line == 2]
    assert short.weights.tolist() == whole.weights[:180].tolist()
    assert {0.25, 1.0} == set(short.weights.tolist())


def test_loss_weights_take_no_memory_where_there_are_none_and_count_in_the_cache(tmp_path):
    row = chat("Hi", "short")
    path = write_jsonl(tmp_path / "d.jsonl", [row, row])
    found = build_data(path).train
    (store,) = found._stores
    assert store.num_weighted == 0
    assert (store.folder / "weights.npy").stat().st_size <= 128  # only the header
    row["messages"][1]["weight"] = 0.5
    changed = build_data(write_jsonl(path, [row, row])).train
    assert changed._stores[0].key != store.key
    assert changed.fingerprint() != found.fingerprint()
    assert changed._stores[0].tokens(0, 0, 9)[0].tolist() == store.tokens(0, 0, 9)[0].tolist()


@pytest.mark.parametrize("declared", [False, True], ids=["silent", "declared"])
def test_an_algorithm_whose_loss_ignores_weights_refuses_them(tmp_path, declared):
    (tmp_path / "own.py").write_text(
        "from xtuner.algorithms.base import BaseAlgorithm\n"
        "class Own(BaseAlgorithm):\n"
        "    def loss(self, model, batch):\n"
        "        return super().loss(model, batch)\n"
        + ("    takes_weights = True\n" if declared else "")
    )
    row = chat("Hi", "short")
    row["messages"][1]["weight"] = 0.5
    path = write_jsonl(tmp_path / "d.jsonl", [row])
    options = {"algorithm": "own.py:Own", "folder": tmp_path}
    if declared:
        assert build_data(path, **options).train[0][0].weights is not None
        return
    with pytest.raises(ConfigError, match=r"Own\.loss does not declare .* takes_weights = True"):
        build_data(path, **options)


def test_without_packing_there_is_one_sample_a_pack(tmp_path):
    data = build_data(write_jsonl(tmp_path / "d.jsonl", chats(5)), pack_to_max_length=False)
    assert [len(data.train[i]) for i in range(len(data.train))] == [1] * 5
    assert "packs of" not in data.report.lines()[-1]


def test_truncation_keeps_the_beginning_and_invents_nothing(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [chat("Hi", "abcdefghij" * 20), chat("Hi", "short")])
    whole = build_data(path, pack_to_max_length=False, shuffle=False).train
    cut = build_data(path, pack_to_max_length=False, shuffle=False, max_length=64).train
    long, short = whole[0][0], cut[0][0]
    assert len(short.input_ids) == 64
    assert short.input_ids.tolist() == long.input_ids[:64].tolist()
    assert short.loss_mask.tolist() == long.loss_mask[:64].tolist()
    assert not text_of(short).endswith("<|im_end|>")
    assert cut[1][0].input_ids.tolist() == whole[1][0].input_ids.tolist()
    assert cut.num_supervised == sum(int(s.loss_mask[1:].sum()) for (s,) in cut)


def test_a_row_whose_answer_is_cut_off_is_lost_and_named(tmp_path):
    rows = [chat("long question " * 9, "never seen"), chat("Hi", "Hello")]
    data = build_data(write_jsonl(tmp_path / "d.jsonl", rows), max_length=64)
    assert lines_of(data.train) == [2]
    (group,) = data.report.sources[0].lost
    assert "no supervised token within max_length = 64" in group.what
    assert [location.number for location in group.first] == [1]
    assert data.report.sources[0].changed == ()


def test_overlong_rows_can_be_dropped(tmp_path):
    rows = [chat("Hi", "x" * 100), chat("Hi", "Hello")]
    data = build_data(write_jsonl(tmp_path / "d.jsonl", rows), max_length=64, overlong="drop")
    assert lines_of(data.train) == [2]
    assert "more than max_length = 64" in data.report.sources[0].lost[0].what


def test_overlong_rows_can_be_an_error(tmp_path):
    rows = [chat("Hi", "x" * (35 + n)) for n in range(20)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(DataError) as caught:
        build_data(path, max_length=64, overlong="error")
    message = str(caught.value)
    assert "13 rows have more than max_length = 64 tokens; the longest has 77" in message
    assert f"{path} line 8: 65 tokens" in message and "and 3 more" in message
    assert build_data(path, max_length=77, overlong="error").train.num_samples == 20


@pytest.mark.parametrize("size", [63, 64, 127, 128, 191, 192, 1000])
def test_split_texts_lose_nothing(tmp_path, size):
    text = "".join(chr(97 + n % 26) for n in range(size))
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": text}, {"text": "short"}])
    options = {"algorithm": "pretrain", "pack_to_max_length": False, "shuffle": False}
    data = build_data(path, max_length=64, **options)
    samples = [s for (s,) in data.train]
    pieces = [s for s in samples if s.row.line == 1]
    joined = np.concatenate([s.input_ids for s in pieces])
    assert tokenizer().decode(joined) == text + "<|im_end|>"
    assert all(2 <= len(s.input_ids) <= 64 for s in pieces)
    assert len(pieces) == -(-(size + 1) // 64)
    assert data.train.num_supervised == sum(len(s.input_ids) - 1 for s in samples)
    (source,) = data.report.sources
    assert sum(g.count for g in source.changed) == (len(pieces) > 1)
    assert source.rows_used == 2


def test_a_split_row_stays_on_one_side_of_the_validation(tmp_path):
    rows = [{"text": f"{n} " + "x" * 300} for n in range(10)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    data = build_data(path, algorithm="pretrain", max_length=64, validation_ratio=0.3)
    learnt, aside = set(lines_of(data.train)), set(lines_of(data.validation))
    assert not learnt & aside
    assert len(aside) == 3
    assert data.validation.num_samples == 3 * 5


def test_sources_are_mixed_by_repeats_without_copying_tokens(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", chats(10))
    b = write_jsonl(tmp_path / "b.jsonl", [chat(f"b {n}", "x") for n in range(4)])
    data = build_data(a, b, data_repeats=(0.5, 3.0))
    sources = [s.row.source for i in range(len(data.train)) for s in data.train[i]]
    assert (sources.count(str(a)), sources.count(str(b))) == (5, 12)
    first, second = data.report.sources
    assert (first.rows_used, first.rows_left_out) == (5, 5)
    assert (second.rows_used, second.rows_left_out) == (4, 0)


def test_max_dataset_length_limits_the_rows(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", chats(50))
    data = build_data(path, max_dataset_length=20, validation_ratio=0.25)
    assert (data.train.num_samples, data.validation.num_samples) == (15, 5)
    assert data.report.sources[0].rows_left_out == 30


def test_the_same_settings_build_the_same_data(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", chats(40))
    options = {"data_repeats": (1.5,), "validation_ratio": 0.1, "max_dataset_length": 50}
    first, again = (build_data(a, **options, max_length=256) for _ in range(2))
    assert first.train.fingerprint() == again.train.fingerprint()
    assert first.validation.fingerprint() == again.validation.fingerprint()
    assert first.report == again.report


def test_files_of_a_folder_may_have_formats_of_their_own(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "chats.jsonl", chats(3))
    write_jsonl(folder / "alpaca.jsonl", [{"instruction": "a", "input": "", "output": "b"}] * 2)
    (folder / "empty.jsonl").write_text("\n")
    data = build_data(folder)
    (source,) = data.report.sources
    assert source.formats == {"alpaca": 1, "openai": 1}
    assert "5 rows in 2 files, format alpaca (1 file), openai (1 file)" in source.lines()[0]


def test_rows_that_lack_optional_columns_do_not_decide_the_format(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "input": "c"}]
    report = build_data(write_jsonl(tmp_path / "d.jsonl", rows)).report
    assert report.sources[0].formats == {"alpaca": 1}
    assert report.sources[0].rows_lost == 0


def test_all_source_errors_are_reported_together(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    write_jsonl(tmp_path / "odd.jsonl", [{"foo": 1}])
    write_jsonl(tmp_path / "good.jsonl", chats(2))
    with pytest.raises(DataError) as caught:
        build_data("empty.jsonl", "missing.jsonl", "good.jsonl", "odd.jsonl", folder=tmp_path)
    message = str(caught.value)
    assert message.startswith("3 problems with the data:")
    assert "empty.jsonl: contains no rows" in message
    assert "'missing.jsonl': no such file" in message
    assert "odd.jsonl: no format matches the columns 'foo'" in message


def test_a_file_of_nothing_but_broken_lines_is_refused(tmp_path):
    (tmp_path / "d.jsonl").write_text("{\n" * 200)
    with pytest.raises(DataError, match=r"none of the first 100 rows .* is not valid JSON"):
        build_data("d.jsonl", folder=tmp_path)


def test_a_data_set_without_a_usable_row_names_reasons_lines_and_hints(tmp_path):
    rows = [chat("", "x")] * 3 + [{"messages": [{"role": "user", "content": "Hi"}]}]
    good = write_jsonl(tmp_path / "good.jsonl", chats(3))
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(DataError) as caught:
        build_data(good, path)
    message = str(caught.value)
    assert f"{path}: none of its 4 rows can be used" in message
    assert "3 rows: messages[0].content: is empty; fill it in" in message
    assert "(lines 1, 2, 3)" in message
    assert "messages: has no assistant turn; add one" in message
    assert str(good) not in message


def test_a_data_set_without_a_supervised_token_is_refused(tmp_path):
    rows = chats(3)
    for row in rows:
        row["messages"][1]["loss"] = False
    with pytest.raises(DataError, match="no supervised token"):
        build_data(write_jsonl(tmp_path / "d.jsonl", rows))


def test_a_validation_split_of_everything_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", chats(1))
    assert build_data(path, validation_ratio=0.5).validation is None
    with pytest.raises(DataError, match="no rows left to train on"):
        build_data(path, path, data_repeats=(0.4, 0.4))


def test_a_text_file_is_cut_into_packs(tmp_path):
    (tmp_path / "book.txt").write_text("Es war einmal.\n\n" * 100)
    data = build_data(tmp_path / "book.txt", algorithm="pretrain", max_length=128, shuffle=False)
    ids = [s.input_ids for i in range(len(data.train)) for s in data.train[i]]
    assert tokenizer().decode(np.concatenate(ids)) == "Es war einmal.\n\n" * 100 + "<|im_end|>"
    assert data.report.sources[0].formats == {"pretrain": 1}
