"""What is told before a run: whether it fits, and what to change."""

import pytest

from xtuner.config.schema import Settings
from xtuner.engine import forecast as module
from xtuner.engine.forecast import forecast, parse_memory, plan_memory
from xtuner.errors import ConfigError
from xtuner.testing.tiny import tiny_model_folder

MB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(
        tmp_path_factory.mktemp("model"),
        num_hidden_layers=6,
        hidden_size=256,
        intermediate_size=1024,
    )


def settings(folder, **changes):
    chosen = {"pretrained_model_name_or_path": str(folder), "data_path": "d", "tuning": "full"}
    return Settings(**{**chosen, "max_length": 2048, "batch_size": 4, **changes})


def test_auto_recomputes_only_where_it_must(folder):
    chosen = settings(folder)
    plenty = plan_memory(chosen, "cpu", memory=2**40)
    assert plenty.fits and not plenty.forecast.recompute
    tight = plan_memory(chosen, "cpu", memory=plenty.forecast.peak - MB)
    assert tight.forecast.recompute and tight.forecast.peak < plenty.forecast.peak
    never = plan_memory(settings(folder, gradient_checkpointing=False), "cpu", memory=MB)
    assert not never.fits and not never.forecast.recompute


def test_cures_come_cheapest_first_and_end_where_it_fits(folder):
    chosen = settings(folder)
    plan = plan_memory(chosen, "cpu", memory=module.LIBRARIES + 110 * MB)
    assert not plan.fits
    lines = list(plan.cures())[1:]
    assert lines[0].strip().startswith("batch_size = 1, accumulative_counts = ")
    peaks = [int(line.split(": ")[1].split(" MiB")[0].replace(",", "")) for line in lines]
    assert peaks == sorted(peaks, reverse=True)
    assert lines[-1].endswith("fits") and not any("fits" in line for line in lines[:-1])


def test_what_cannot_fit_says_so(folder):
    plan = plan_memory(settings(folder), "cpu", memory=MB)
    assert "smaller model" in list(plan.cures())[-1]


def test_a_cure_names_a_setting_that_lowers_this_very_forecast(folder):
    chosen = settings(folder, batch_size=1)
    before = forecast(chosen, "cpu", recompute=False).peak
    for changes in ({"max_length": 1024}, {"tuning": "qlora"}):
        after = forecast(chosen.model_copy(update=changes), "cpu", recompute=False).peak
        assert after < before


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 2**33), ("7.5 GiB", 15 * 2**29), ("600MB", 600 * MB), ("2g", 2**31)]
)
def test_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["8", "GB", "eight GB", "-1GB", "0GB", "8TBs"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="8GB"):
        parse_memory(text)
