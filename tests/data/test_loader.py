import itertools
import os
import random

import numpy as np
import pytest
import torch
from data_makers import build_data, chats, settings, write_jsonl
from image_makers import FixedImages

from xtuner import templates
from xtuner.algorithms.sft import Algorithm
from xtuner.data.build import build
from xtuner.data.collate import concatenate
from xtuner.data.images.expansion import ImageCollate, ImageLayout
from xtuner.data.images.files import ImageFolder
from xtuner.data.loader import Loader
from xtuner.errors import DataError
from xtuner.models.vision.tower import add_image_token
from xtuner.testing.tiny import tiny_tokenizer
from xtuner.testing.vision import tiny_images


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XTUNER_CACHE", str(tmp_path_factory.mktemp("cache")))
        path = write_jsonl(tmp_path_factory.mktemp("data") / "d.jsonl", chats(90))
        return build_data(path, max_length=256).train


def loader(dataset, **changes):
    options = {"batch_size": 2, "accumulative_counts": 3, "seed": 7, "shuffle": True}
    return Loader(dataset, collate=concatenate, **{**options, **changes})


def plain(groups):
    """Groups as nested lists, to compare them."""
    return [[batch.input_ids.tolist() for batch in group] for group in groups]


def rows(group):
    return [row.line for batch in group for row in batch.rows]


def test_an_epoch_has_every_sample_once(dataset):
    one = loader(dataset)
    for epoch in range(2):
        first = epoch * one.steps_per_epoch
        seen = [line for g in one.groups(first, first + one.steps_per_epoch) for line in rows(g)]
        assert sorted(seen) == list(range(1, 91))


def test_the_last_group_may_be_smaller(dataset):
    one = loader(dataset, accumulative_counts=4)
    assert len(dataset) % 8 not in (0, 7)
    groups = list(one.groups(0, one.steps_per_epoch + 1))
    sizes = [len(group) for group in groups]
    left = len(dataset) % 8
    assert sizes == [4] * (one.steps_per_epoch - 1) + [-(-left // 2)] + [4]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_step_does_not_depend_on_where_the_loader_began(dataset, num_workers):
    straight = plain(loader(dataset).groups(0, 9))
    assert loader(dataset).steps_per_epoch < 9
    resumed = plain(loader(dataset, num_workers=num_workers).groups(5, 9))
    assert resumed == straight[5:]


def test_epochs_differ_and_seeds_differ(dataset):
    n = loader(dataset).steps_per_epoch
    first = plain(loader(dataset).groups(0, n))
    assert first != plain(loader(dataset).groups(n, 2 * n))
    assert first != plain(loader(dataset, seed=8).groups(0, n))


def test_without_shuffling_the_packs_keep_their_order(dataset):
    one = loader(dataset, shuffle=False)
    n = one.steps_per_epoch
    in_order = [s.row.line for i in range(len(dataset)) for s in dataset[i]]
    for first in (0, n):
        assert [x for g in one.groups(first, first + n) for x in rows(g)] == in_order


def test_the_counts_of_the_batches_are_those_of_the_packs(dataset):
    one = loader(dataset)
    batches = [batch for group in one.groups(0, one.steps_per_epoch) for batch in group]
    assert sum(batch.num_tokens for batch in batches) == dataset.num_tokens
    assert sum(batch.num_supervised for batch in batches) == dataset.num_supervised


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_group_of_one(dataset, world_size):
    alone = loader(dataset, accumulative_counts=world_size, batch_size=2)
    ranks = [
        loader(dataset, accumulative_counts=1, batch_size=2, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    assert {one.steps_per_epoch for one in ranks} == {alone.steps_per_epoch}
    steps = alone.steps_per_epoch + 2
    shares = [plain(one.groups(0, steps)) for one in ranks]
    for step, group in enumerate(plain(alone.groups(0, steps))):
        together = [batch for share in shares for batch in share[step]]
        assert sorted(together) == sorted(group)


def test_a_share_may_be_empty(dataset):
    ranks = len(dataset) + 2
    last = loader(dataset, batch_size=1, accumulative_counts=1, rank=ranks - 1, world_size=ranks)
    assert list(last.groups(0, 2)) == [[], []]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_random_states_are_left_alone(dataset, num_workers):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    list(loader(dataset, num_workers=num_workers).groups(0, 3))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_an_empty_data_set_is_refused(dataset):
    with pytest.raises(DataError, match="the data set is empty"):
        Loader([], collate=concatenate, batch_size=1, accumulative_counts=1, seed=0, shuffle=True)


class ProcessNumbers(FixedImages):
    """Images whose pixels are the number of the process that made them."""

    def preprocess(self, image):
        return np.full((3, 1, 1), os.getpid(), np.float32)


def test_images_are_decoded_in_the_processes_that_load_data(tmp_path):
    names = tiny_images(tmp_path, 4)
    rows = [
        {"image": name, "conversations": [{"from": "human", "value": "<image>What?"},
                                          {"from": "gpt", "value": name}]}
        for name in names
    ]  # fmt: skip
    own = tiny_tokenizer()
    image_layout = ImageLayout(ImageFolder(tmp_path), add_image_token(own), ProcessNumbers(1))
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    data = build(
        settings(path), template=templates.load("auto", own), tokenizer=own, folder=tmp_path,
        quiet=True, image_layout=image_layout,
        algorithm=Algorithm(),
    )  # fmt: skip

    collate = ImageCollate(concatenate, image_layout)
    for workers, elsewhere in ((0, False), (1, True)):
        one = Loader(
            data.train, collate=collate, batch_size=1, accumulative_counts=1, seed=1, shuffle=True,
            num_workers=workers,
        )  # fmt: skip
        (batch,) = next(one.groups(0, 1))
        pids = {int(pid) for pid in torch.stack(batch.images.pixel_values).flatten().tolist()}
        assert (os.getpid() not in pids) is elsewhere


class Kinds:
    """A data set with modalities and lengths only."""

    def __init__(self, count):
        drawn = np.random.default_rng(3)
        self.has_images = drawn.random(count) < 0.4
        self.lengths = drawn.integers(10, 1000, count)

    def __len__(self):
        return len(self.lengths)


def epoch_of(data, **changes):
    options = {"batch_size": 8, "accumulative_counts": 1, "seed": 7, "shuffle": True}
    one = Loader(data, collate=concatenate, **{**options, **changes})
    return [packs for step in range(one.steps_per_epoch) for packs in one._packs_of_step(step)]


def test_batches_are_of_one_modality_and_of_like_length():
    data = Kinds(1003)
    batches = epoch_of(data, grouped=True)
    assert sorted(pack for batch in batches for pack in batch) == list(range(1003))
    mixed = [batch for batch in batches if len({*data.has_images[batch].tolist()}) > 1]
    assert len(mixed) <= 1  # the group with the remainders of both kinds

    def spread(batches):
        return np.mean([np.ptp(data.lengths[batch]) for batch in batches])

    assert spread(batches) < spread(epoch_of(data)) / 5
    kinds = [bool(data.has_images[batch[0]]) for batch in batches]
    assert sum(a != b for a, b in itertools.pairwise(kinds)) > 10  # and they alternate at random


@pytest.mark.parametrize("grouped", [True, False])
def test_packs_are_of_one_modality_if_they_are_grouped(tmp_path, grouped):
    names = tiny_images(tmp_path, 3)
    rows = [
        {**({"image": names[i % 3]} if i % 2 else {}),
         "conversations": [{"from": "human", "value": "<image>What?" if i % 2 else "What?"},
                           {"from": "gpt", "value": "x" * (i % 11 + 1)}]}
        for i in range(40)
    ]  # fmt: skip
    own = tiny_tokenizer()
    image_layout = ImageLayout(ImageFolder(tmp_path), add_image_token(own), FixedImages(4))
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    chosen = settings(
        path, visual_encoder_name_or_path="-", max_length=160, group_by_modality=grouped
    )
    data = build(
        chosen, template=templates.load("auto", own), tokenizer=own, folder=tmp_path, quiet=True,
        image_layout=image_layout, algorithm=Algorithm(),
    ).train  # fmt: skip
    kinds = [{bool(sample.images) for sample in data[i]} for i in range(len(data))]
    assert all(len(kind) == 1 for kind in kinds) is grouped
