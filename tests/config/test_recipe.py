"""How 'auto' is resolved in settings that depend on the amount of data."""

import pytest

from xtuner.config import recipe
from xtuner.config.schema import Settings


def settings(**values):
    return Settings(pretrained_model_name_or_path="m", data_path=("d.jsonl",), **values)


def steps(chosen, packs):
    """Optimizer steps of the run, in one process."""
    return -(-packs // chosen.accumulative_counts) * chosen.max_epochs


@pytest.mark.parametrize(
    ("rows", "packs", "accumulated", "epochs"),
    [
        (1, 1, 1, 15),
        (30, 8, 1, 15),
        (100, 25, 1, 15),
        (1_000, 130, 1, 15),
        (1_000, 1_000, 7, 15),
        (5_000, 260, 2, 5),
        (10_000, 1_000, 7, 3),
        (50_000, 2_000, 15, 3),
        (500_000, 20_000, 16, 1),
    ],
)
def test_few_rows_take_many_epochs_and_many_rows_large_steps(rows, packs, accumulated, epochs):
    chosen = recipe.resolved(settings(), rows=rows, packs=packs, length=2048, ranks=1)
    assert (chosen.accumulative_counts, chosen.max_epochs) == (accumulated, epochs)


@pytest.mark.parametrize(("rows", "epochs"), [(999, 15), (1_000, 15), (10_000, 3), (20_000, 1)])
def test_few_rows_are_repeated_even_if_each_is_a_step(rows, epochs):
    one = settings(accumulative_counts=1)
    assert recipe.resolved(one, rows=rows, packs=rows, length=64, ranks=1).max_epochs == epochs


def test_the_number_of_epochs_falls_with_the_rows():
    def epochs(rows):
        chosen = recipe.resolved(settings(), rows=rows, packs=rows, length=2048, ranks=1)
        return chosen.max_epochs

    found = [epochs(rows) for rows in (1, 50, 1_000, 1_001, 2_000, 5_000, 9_999, 10_000)]
    assert found == [15, 15, 15, 15, 9, 5, 3, 3]


@pytest.mark.parametrize(
    ("rows", "repetitions", "epochs"),
    [(30, 1, 15), (30, 2, 8), (2_000, 2_000, 1), (2_000, 2, 8), (20_000, 20, 1), (20_000, 2, 2)],
)
def test_repetitions_within_the_data_count_as_epochs(rows, repetitions, epochs):
    chosen = recipe.resolved(
        settings(), rows=rows, packs=rows, length=64, ranks=1, repetitions=repetitions
    )
    assert chosen.max_epochs == epochs


def test_what_the_user_sets_is_kept():
    given = settings(lora_alpha=8, accumulative_counts=4, max_epochs=2, pack_length=512)
    assert recipe.resolved(given, rows=8, packs=8, length=512, ranks=1) == given
    assert recipe.chosen(given) == ()


def test_max_steps_is_reached():
    chosen = recipe.resolved(settings(max_steps=500), rows=10, packs=10, length=100, ranks=1)
    assert steps(chosen, 10) >= 500


def test_processes_and_batches_count_as_larger_steps():
    alone = recipe.resolved(settings(), rows=9_000, packs=640, length=2048, ranks=1)
    four = recipe.resolved(settings(batch_size=2), rows=9_000, packs=640, length=2048, ranks=2)
    assert (alone.accumulative_counts, four.accumulative_counts) == (5, 1)


def test_the_scale_is_that_of_rank_stabilized_lora():
    assert settings(lora_r=64).effective_lora_alpha / 64 == 2
    assert settings(lora_r=16).effective_lora_alpha / 16 == 4
    assert settings(lora_r=16, lora_alpha=8).effective_lora_alpha == 8


def test_packs_are_shorter_if_an_epoch_would_have_few():
    def length(rows, tokens, longest=0, **values):
        lengths = [tokens] * (rows - 1) + [max(longest, tokens)]
        return recipe.pack_length(settings(**values), lengths=lengths, limit=2048)

    assert length(32, 50) == 200, "of 4 samples"
    assert length(1_280, 50) == 500, "128 packs"
    assert length(32, 50, longest=900) == 900
    assert length(10_000, 50) == 2048
    assert length(1_280, 50, batch_size=2) == 250, "128 micro-batches"
    assert length(1_280, 50, pack_length=600) == 600
    assert length(1, 50) == 50
    assert length(32, 50, accumulative_counts=1) == 2048, "the user decides the size of a step"


def test_settings_without_effect_are_not_chosen():
    assert "lora_alpha" not in recipe.chosen(settings(tuning="full"))
    assert "pack_length" not in recipe.chosen(settings(pack_to_max_length=False))


def test_a_resume_keeps_the_numbers_of_its_run():
    before = {"lora_alpha": 16, "accumulative_counts": 16, "max_epochs": 3, "max_length": 256}
    again = recipe.as_before(settings(max_epochs=5, max_length=256), before)
    assert (again.lora_alpha, again.accumulative_counts, again.max_epochs) == (16, 16, 5)
    assert again.pack_length == 256, "packs were full before the setting"
    assert recipe.as_before(settings(), {}) == settings()


def test_a_resume_with_more_max_steps_gets_the_epochs_that_they_need():
    before = {"max_epochs": 1, "max_steps": 3, "max_length": 256}
    assert recipe.as_before(settings(max_steps=5), before).max_epochs == "auto"
    assert recipe.as_before(settings(), before).max_epochs == "auto"
    assert recipe.as_before(settings(max_epochs=2, max_steps=5), before).max_epochs == 2
