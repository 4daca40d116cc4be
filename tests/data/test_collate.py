from dataclasses import replace

import numpy as np
import torch

from xtuner.data.collate import concatenate
from xtuner.types import IGNORE_INDEX, RowRef, Sample


def sample(ids, mask, line=1):
    return Sample(np.array(ids), np.array(mask, dtype=bool), RowRef("d.jsonl", line))


def test_samples_are_concatenated_without_loss_across_boundaries():
    batch = concatenate([sample([7, 8, 9], [1, 0, 1]), sample([5, 6], [1, 1], line=4)])
    x = IGNORE_INDEX
    assert batch.input_ids.tolist() == [[7, 8, 9, 5, 6]]
    assert batch.labels.tolist() == [[x, x, 9, x, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.rows == (RowRef("d.jsonl", 1), RowRef("d.jsonl", 4))
    assert batch.num_supervised == 2
    for tensor in (batch.input_ids, batch.labels, batch.position_ids):
        assert tensor.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32


def test_weights_of_samples_without_any_are_one():
    plain = sample([7, 8], [0, 1])
    assert concatenate([plain]).weights is None
    weights = np.array([1, 0.5, 2], np.float32)
    batch = concatenate([plain, replace(sample([5, 6, 7], [0, 1, 1]), weights=weights)])
    assert batch.weights.tolist() == [[1, 1, 1, 0.5, 2]]
    assert batch.weights_of_predicting.tolist() == [1, 0.5, 2]
    assert batch.sum_of_weights == 3.5
    first, second = batch.split()
    assert (first.sum_of_weights, second.sum_of_weights) == (1, 2.5)


def test_the_batch_does_not_share_memory_with_the_sample():
    one = sample([1, 2, 3], [0, 1, 1])
    concatenate([one]).input_ids[0, 0] = 99
    assert one.input_ids[0] == 1
