"""A chat template that rewrites earlier turns turns a row into several samples."""

import pytest
from data_makers import build_data, chat, lines_of, text_of, tokenizer, write_jsonl
from image_makers import FixedImages
from template_makers import REWRITES

from xtuner import templates
from xtuner.data.images.expansion import ImageLayout
from xtuner.data.images.files import ImageFolder
from xtuner.models.vision.tower import add_image_token
from xtuner.testing.tiny import tiny_tokenizer
from xtuner.testing.vision import tiny_images

TURNS = 3


@pytest.fixture(scope="module")
def rewriting():
    own = tiny_tokenizer()
    own.chat_template = REWRITES
    return templates.load("auto", own)


def long_chat(number):
    turns = [chat(f"question {number}.{i}", f"answer {number}.{i}") for i in range(TURNS)]
    return {"messages": [message for turn in turns for message in turn["messages"]]}


@pytest.fixture
def path(tmp_path):
    return write_jsonl(tmp_path / "d.jsonl", [long_chat(0), chat("only", "one"), long_chat(1)])


def learned(sample):
    """What a sample supervises."""
    return tokenizer().decode(sample.input_ids[sample.loss_mask])


def samples_of(data):
    return [sample for i in range(len(data.train)) for sample in data.train[i]]


def test_every_turn_is_learned_once_behind_its_own_prompt(path, rewriting):
    data = build_data(path, own_template=rewriting, max_length=512)
    samples = samples_of(data)
    assert sorted(lines_of(data.train)) == [1] * TURNS + [2] + [3] * TURNS
    empty = "<think>\n\n</think>\n\n"
    wanted = [f"{empty}answer {n}.{i}<|im_end|>" for n in (0, 1) for i in range(TURNS)]
    assert sorted(map(learned, samples)) == sorted([*wanted, f"{empty}one<|im_end|>"])
    for sample in samples:
        text = text_of(sample)
        assert text.rstrip().endswith(learned(sample)) and text.count(empty) == 1
    assert data.train.num_supervised == sum(int(s.loss_mask.sum()) for s in samples)


def test_the_report_counts_rows_and_says_how_many_samples_they_become(path, rewriting):
    report = build_data(path, own_template=rewriting, max_length=512).report
    (source,) = report.sources
    assert (source.rows_read, source.rows_used, source.rows_lost) == (3, 3, 0)
    assert report.train.samples == 2 * TURNS + 1
    told = "2 rows become 6 samples, since the chat template rewrites earlier turns (lines 1, 3)"
    assert told in "\n".join(report.lines())


def test_the_samples_of_a_row_stay_on_one_side_of_the_validation(tmp_path, rewriting):
    path = write_jsonl(tmp_path / "d.jsonl", [long_chat(n) for n in range(10)])
    data = build_data(path, own_template=rewriting, max_length=512, validation_ratio=0.3)
    assert not {*lines_of(data.train)} & {*lines_of(data.validation)}
    assert data.validation.num_samples == 3 * TURNS


def test_the_number_of_rows_is_limited_not_that_of_samples(path, rewriting):
    data = build_data(path, own_template=rewriting, max_length=512, max_dataset_length=2)
    assert len({*lines_of(data.train)}) == 2


def test_truncation_loses_the_turns_that_do_not_fit(path, rewriting):
    longest = max(len(s.input_ids) for s in samples_of(build_data(path, own_template=rewriting)))
    data = build_data(path, own_template=rewriting, max_length=longest - 40, overlong="truncate")
    assert sorted(lines_of(data.train)) == [1] * (TURNS - 1) + [2] + [3] * (TURNS - 1)
    (source,) = data.report.sources
    assert source.rows_used == 3 and "cut to" in "\n".join(data.report.lines())


def test_a_row_with_a_sample_too_long_can_be_dropped(path, rewriting):
    longest = max(len(s.input_ids) for s in samples_of(build_data(path, own_template=rewriting)))
    data = build_data(path, own_template=rewriting, max_length=longest - 1, overlong="drop")
    assert lines_of(data.train) == [2]
    (source,) = data.report.sources
    assert source.rows_lost == 2


def test_a_row_as_long_as_all_its_samples_is_not_too_long(path, rewriting):
    samples = samples_of(build_data(path, own_template=rewriting))
    longest = max(len(s.input_ids) for s in samples)
    assert sum(len(s.input_ids) for s in samples if s.row.line == 1) > longest
    data = build_data(path, own_template=rewriting, max_length=longest, overlong="error")
    assert data.train.num_samples == 2 * TURNS + 1


def test_a_cached_store_gives_the_same_samples(path, rewriting):
    first, again = (build_data(path, own_template=rewriting, max_length=512) for _ in range(2))
    assert first.train.fingerprint() == again.train.fingerprint()
    assert list(map(text_of, samples_of(first))) == list(map(text_of, samples_of(again)))


def test_each_sample_has_the_images_that_it_shows(tmp_path):
    own = tiny_tokenizer()
    own.chat_template = REWRITES
    layout = ImageLayout(ImageFolder(tmp_path), add_image_token(own), FixedImages(4))
    first, second = tiny_images(tmp_path, 2)
    turns = [("user", "<image>What?"), ("assistant", "A cat."), ("user", "<image>And?")]
    row = {
        "messages": [{"role": r, "content": c} for r, c in [*turns, ("assistant", "A dog.")]],
        "images": [first, second],
    }
    path = write_jsonl(tmp_path / "d.jsonl", [row])
    data = build_data(
        path, own_template=templates.load("auto", own), image_layout=layout, max_length=512,
        visual_encoder_name_or_path="-",
    )  # fmt: skip
    short, long = sorted(samples_of(data), key=lambda sample: len(sample.input_ids))
    assert [ref.name for ref in short.images] == [first]
    assert [ref.name for ref in long.images] == [first, second]
    for sample in (short, long):
        assert (sample.input_ids == layout.token_id).sum() == 4 * len(sample.images)
        assert layout.without_cut_image(sample).images == sample.images
