import pickle
from itertools import pairwise

import numpy as np
import pytest
from counting import lines_run
from data_makers import build_data, chats, lines_of, text_of, write_jsonl

from xtuner.data.packing import order
from xtuner.data.packing.pack import pack


def instruction_lengths(count, longest=2048):
    """Lengths like those of instructions: 200 tokens on average, some very long."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(170), 0.6, count))
    return np.clip(lengths, 10, longest).astype(np.int64)


def packs_of(lengths, capacity, **options):
    order_ = options.get("order", order.permutation(len(lengths), "test"))
    members, starts = pack(lengths, capacity, order=order_)
    return [members[a:b].tolist() for a, b in pairwise(starts)]


@pytest.mark.parametrize("capacity", [64, 100, 2048])
@pytest.mark.parametrize("count", [1, 2, 17, 3000])
def test_every_sample_is_in_one_pack_and_no_pack_is_too_long(count, capacity):
    lengths = instruction_lengths(count, longest=capacity)
    packs = packs_of(lengths, capacity)
    assert sorted(s for p in packs for s in p) == list(range(count))
    assert all(0 < lengths[p].sum() <= capacity for p in packs)


def test_samples_of_full_length_are_packs_of_their_own():
    assert packs_of(np.full(5, 8), 8, order=np.arange(5)) == [[0], [1], [2], [3], [4]]


def test_no_samples_make_no_packs():
    assert packs_of(np.zeros(0, np.int64), 8) == []


@pytest.mark.parametrize("count", [999, 20_000])
def test_packs_of_instructions_are_full(count):
    lengths = instruction_lengths(count)
    fill = lengths.sum() / (len(packs_of(lengths, 2048)) * 2048)
    assert fill >= 0.99


def test_packs_are_not_sorted_by_length():
    lengths = instruction_lengths(20_000)
    members, _ = pack(lengths, 2048, order=order.permutation(len(lengths), "test"))
    tenths = [part.mean() for part in np.array_split(lengths[members], 10)]
    assert max(tenths) < 1.1 * min(tenths)
    # nor does a pack collect samples of similar length: sorted by length, they would hardly vary
    within = [np.std(lengths[p]) for p in packs_of(lengths, 2048) if len(p) > 3]
    assert np.mean(within) > 0.7 * np.std(lengths)


def test_given_order_is_nearly_kept():
    lengths = instruction_lengths(20_000)
    members, _ = pack(lengths, 2048, order=np.arange(20_000))
    assert np.abs(members - np.arange(20_000)).max() < 2000


@pytest.mark.parametrize("count", [2_000, 16_000])
def test_work_grows_with_the_number_of_samples_and_no_faster(count):
    lengths, order_ = instruction_lengths(count), order.permutation(count, "test")
    lines_run(lambda: pack(lengths, 2048, order=order_), limit=40 * count)


def test_packs_hold_each_row_once_with_its_own_tokens(tmp_path):
    rows = chats(200)
    train = build_data(write_jsonl(tmp_path / "d.jsonl", rows), max_length=256).train
    seen = {}
    for index in range(len(train)):
        samples = train[index]
        assert sum(len(s.input_ids) for s in samples) <= 256
        seen |= {s.row.line: text_of(s) for s in samples}
    assert train.num_samples == len(seen) == 200
    for line, text in seen.items():
        question, answer = (m["content"] for m in rows[line - 1]["messages"])
        assert f"user\n{question}<|im_end|>" in text
        assert f"assistant\n{answer}<|im_end|>" in text


def test_counts_are_those_of_the_samples(tmp_path):
    train = build_data(write_jsonl(tmp_path / "d.jsonl", chats(50)), max_length=256).train
    samples = [s for i in range(len(train)) for s in train[i]]
    assert train.num_tokens == sum(len(s.input_ids) for s in samples)
    assert train.num_supervised == sum(int(s.loss_mask[1:].sum()) for s in samples)
    assert (samples[0].input_ids.dtype, samples[0].loss_mask.dtype) == (np.int64, bool)


def test_packs_follow_the_seed(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", chats(60))
    built = [build_data(path, max_length=256, seed=seed).train for seed in (1, 1, 2)]
    first, again, other = map(lines_of, built)
    assert first == again != other
    assert built[0].fingerprint() == built[1].fingerprint() != built[2].fingerprint()


def test_the_fingerprint_sees_a_change_that_the_counts_do_not(tmp_path):
    rows = chats(20)
    first = build_data(write_jsonl(tmp_path / "a.jsonl", rows)).train
    rows[3]["messages"][0]["content"] = "QUESTION 3"
    second = build_data(write_jsonl(tmp_path / "b.jsonl", rows)).train
    assert first.num_tokens == second.num_tokens
    assert first.fingerprint() != second.fingerprint()


def test_without_packing_and_shuffling_samples_stand_in_the_order_of_the_file(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", chats(30))
    train = build_data(path, pack_to_max_length=False, shuffle=False).train
    assert len(train) == 30
    assert lines_of(train) == list(range(1, 31))


def test_a_data_set_survives_pickling_without_its_tokens(tmp_path):
    train = build_data(write_jsonl(tmp_path / "d.jsonl", chats(300)), max_length=256).train
    raw = pickle.dumps(train)
    assert len(raw) < 60 * 300  # the tokens alone would be 100 kB
    assert lines_of(pickle.loads(raw)) == lines_of(train)


def test_a_pack_beyond_the_end_is_an_index_error(tmp_path):
    train = build_data(write_jsonl(tmp_path / "d.jsonl", chats(3))).train
    assert len(list(train)) == len(train)
    with pytest.raises(IndexError, match="number of packs: 1"):
        train[1]
