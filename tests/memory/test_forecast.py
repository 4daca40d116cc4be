"""The forecast before a run: whether it fits, and what to change."""

import pytest
import torch

from xtuner.cli.app import main
from xtuner.config.combinations import check_combinations
from xtuner.config.schema import Settings
from xtuner.errors import ConfigError
from xtuner.memory import available
from xtuner.memory import forecast as module
from xtuner.memory.available import parse_memory
from xtuner.memory.footprint import Footprint
from xtuner.memory.forecast import forecast
from xtuner.memory.plan import plan_memory
from xtuner.models.facts import facts_of
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
    return Settings(**{**chosen, "max_length": 1024, "batch_size": 2, **changes})


def test_auto_recomputes_only_where_it_must(folder):
    chosen = settings(folder)
    plenty = plan_memory(chosen, "cpu", memory=2**40)
    assert plenty.fits and not plenty.forecast.recompute
    tight = plan_memory(chosen, "cpu", memory=plenty.forecast.peak - MB)
    assert tight.forecast.recompute and tight.forecast.peak < plenty.forecast.peak
    never = plan_memory(settings(folder, gradient_checkpointing=False), "cpu", memory=MB)
    assert not never.fits and not never.forecast.recompute


def test_hints_come_cheapest_first_and_end_where_it_fits(folder):
    chosen = settings(folder, accumulative_counts=16)
    plan = plan_memory(chosen, "cpu", memory=module.LIBRARIES + 60 * MB)
    assert not plan.fits
    lines = list(plan.hints())[1:]
    assert lines[0].strip().startswith("batch_size = 1, accumulative_counts = ")
    peaks = [int(line.split(": ")[1].split(" MiB")[0].replace(",", "")) for line in lines]
    assert peaks == sorted(peaks, reverse=True)
    assert lines[-1].endswith("fits") and not any("fits" in line for line in lines[:-1])


def test_a_strategy_divides_and_the_cheapest_that_fits_is_named(folder):
    chosen = settings(folder, gradient_checkpointing=True, batch_size=1)

    def found(strategy, processes=4, **changes):
        tried = chosen.model_copy(update={"strategy": strategy, **changes})
        return forecast(tried, "cuda", recompute=True, processes=processes)

    whole = found("replicated")
    parts, each = whole.footprint, whole.footprint.trainable * 4
    assert whole.peak == found("replicated", processes=1).peak
    first, second = found("deepspeed_zero1"), found("deepspeed_zero2")
    assert first.held_optimizer == whole.optimizer // 4
    assert first.held_weights == parts.weights + each // 4  # a float32 copy of the part
    assert first.peak > second.peak
    third = found("fsdp2")
    assert third.held_weights == parts.weights // 4
    assert 2 * parts.unit == third.gathered < parts.weights
    offloaded = found("fsdp2", strategy_options=(("cpu_offload", True),))
    assert offloaded.held_weights == offloaded.held_optimizer == 0
    for enough, name in ((first, "deepspeed_zero1"), (second, "deepspeed_zero2")):
        plan = plan_memory(chosen, "cuda", memory=enough.peak, processes=4)
        assert list(plan.hints())[1].strip().startswith(f"strategy = '{name}': ")
        assert list(plan.hints())[-1].endswith("fits")


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_shared_weights_are_gathered_for_the_whole_pass(tuning, folder, tmp_path):
    tied = tiny_model_folder(
        tmp_path,
        num_hidden_layers=6,
        hidden_size=256,
        intermediate_size=1024,
        tie_word_embeddings=True,
    )

    def found(model):
        chosen = settings(model, tuning=tuning, strategy="fsdp2", dtype="float32")
        return forecast(chosen, "cpu", recompute=False, processes=2)

    apart, shared = found(folder), found(tied)
    assert apart.footprint.shared == 0 and shared.footprint.shared == 261 * 256 * 4
    assert apart.gathered == 2 * apart.footprint.unit
    assert shared.gathered == 2 * shared.footprint.unit + shared.footprint.shared


def test_impossible_fit_is_reported(folder):
    plan = plan_memory(settings(folder), "cpu", memory=MB)
    assert "smaller model" in list(plan.hints())[-1]


def test_hints_lower_the_forecast(folder):
    chosen = settings(folder, batch_size=1)
    before = forecast(chosen, "cpu", recompute=False).peak
    for changes in ({"max_length": 512}, {"tuning": "qlora"}):
        after = forecast(chosen.model_copy(update=changes), "cpu", recompute=False).peak
        assert after < before


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 2**33), ("7.5 GiB", 15 * 2**29), ("600MB", 600 * MB), ("2g", 2**31)]
)
def test_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["8", "GB", "eight GB", "-1GB", "0GB", "8TBs"])
def test_invalid_sizes(text):
    with pytest.raises(ConfigError, match="8GB"):
        parse_memory(text)


def test_paged_optimizer_state_is_no_memory_of_torch_on_a_gpu(folder):
    paged = forecast(settings(folder, optim_type="PagedAdamW32bit"), "cuda", recompute=True)
    plain = forecast(settings(folder, optim_type="AdamW"), "cuda", recompute=True)
    assert plain.peak - paged.peak == pytest.approx(
        plain.optimizer * module.ALLOCATOR["cuda"], abs=2
    )
    assert "can move to the CPU" in list(paged.lines())[1]
    on_cpu = forecast(settings(folder, optim_type="PagedAdamW32bit"), "cpu", recompute=True)
    assert "move" not in list(on_cpu.lines())[1] and not on_cpu.paged


@pytest.fixture
def measured(monkeypatch):
    """A model of 100 MiB, whose step takes 400 MiB more, 150 with recomputation."""

    def footprint(chosen, device, recompute, keys):
        step = 150 if recompute else 400
        return Footprint(100 * MB, step * MB, 40 * MB, 10 * MB, 25 * MB)

    monkeypatch.setattr(module, "_footprint", footprint)


def test_state_is_paged_only_where_it_must(folder, measured):
    """Before activations are recomputed, since that costs more."""
    chosen = settings(folder, optim_type="PagedAdamW32bit")
    plenty = plan_memory(chosen, "cuda", memory=2**40)
    assert not plenty.paged and any("AdamW32bit for Paged" in line for line in plenty.lines())
    plain = forecast(settings(folder, optim_type="AdamW"), "cuda", recompute=False)
    assert plenty.forecast.peak == plain.peak  # the state counts
    tight = plan_memory(chosen, "cuda", memory=plenty.forecast.peak - MB)
    assert tight.fits and tight.paged and not tight.forecast.recompute
    assert not any("fits unpaged" in line for line in tight.lines())
    last = plan_memory(chosen, "cuda", memory=tight.forecast.peak - MB)
    assert last.forecast.recompute
    least = plan_memory(chosen, "cuda", memory=MB)
    assert least.paged and least.forecast.recompute
    assert not plan_memory(chosen, "cpu", memory=MB).paged


def test_paging_can_be_asked_for_and_refused(folder, measured):
    def chosen(paged, optim_type="PagedAdamW32bit"):
        return settings(folder, optim_type=optim_type, paged_optimizer=paged, batch_size=1)

    assert plan_memory(chosen(True), "cuda", memory=2**40).paged
    never = plan_memory(chosen(False), "cuda", memory=MB)
    assert not never.paged and any("is not paged" in line for line in never.lines())
    hints = list(plan_memory(chosen(False), "cuda", memory=MB).hints())
    assert any("paged_optimizer = True" in line for line in hints)
    pages = plan_memory(chosen("auto"), "cuda", memory=MB)
    assert not any("paged_optimizer" in line for line in pages.hints())
    assert dict(check_combinations(chosen(True, "AdamW")))["paged_optimizer"]
    assert not list(check_combinations(chosen(True)))
    assert chosen(False, "AdamW").without_effect() == ["paged_optimizer"]
    assert chosen(False).without_effect() == []


def test_hints_are_settings_that_a_run_takes(folder):
    """tuning = 'qlora' by itself would be rejected with quantization = 'none'."""
    chosen = settings(folder, quantization="none", batch_size=1)
    plan = plan_memory(chosen, "cuda", memory=MB)
    named = [line for line in plan.hints() if "qlora" in line]
    assert named and "quantization = 'auto'" in named[0]
    frozen = settings(folder, tuning="lora", quantization="none", lora_modules_to_save=["lm_head"])
    assert any("'auto'" in line for line in plan_memory(frozen, "cuda", memory=MB).hints())


def test_processes_share_the_memory_of_a_cpu_and_not_of_gpus(folder):
    def room(device):
        return plan_memory(settings(folder), device, memory=2**33, processes=4).memory

    assert (room("cpu"), room("cuda")) == (2**31, 2**33)
    alone, shared = available.free_memory("cpu"), available.free_memory("cpu", 2)
    assert shared >= alone - 100 * MB  # memory that the others already hold is available to them


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_forecast_for_a_missing_gpu(folder, tmp_path, capsys):
    (tmp_path / "c.py").write_text(
        f"pretrained_model_name_or_path = {str(folder)!r}\ndata_path = 'd'\ntuning = 'lora'\n"
    )
    dry = ["train", str(tmp_path / "c.py"), "--dry-run", "--device", "cuda"]
    assert main([*dry, "--memory", "8GB"]) == 0
    said = capsys.readouterr().out
    assert "cuda, bfloat16" in said and "Fits in 8,192 MiB" in said
    assert main([*dry, "--memory", "8GB", "--nproc", "2"]) == 0
    assert "Fits in 8,192 MiB for each of 2" in capsys.readouterr().out
    half = ["--memory", "8GB", "--cfg-options", "dtype=float16"]
    assert main([*dry, *half]) == 0
    assert (
        "cuda, float16 (trained weights in float32; the loss scale starts"
        in capsys.readouterr().out
    )
    assert main(dry) == 2
    assert "--memory 8GB" in capsys.readouterr().err


def test_forecast_error_does_not_stop_training(folder, tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise RuntimeError("aten._local_scalar_dense\nmore")

    monkeypatch.setattr(module, "measure", fail)
    module._footprint.cache_clear()
    chosen = settings(folder, seed=77)
    with pytest.raises(RuntimeError):  # our own tests fail on it
        plan_memory(chosen, "cpu", memory=MB)
    monkeypatch.delenv("XTUNER_STRICT")
    plan = plan_memory(chosen, "cpu", memory=MB)
    assert plan.fits and not plan.forecast.recompute
    (line,) = plan.lines()
    assert "forecast failed: RuntimeError: aten._local_scalar_dense" in line
    assert "batch_size" in "".join(plan.hints())
    (tmp_path / "c.py").write_text(
        f"pretrained_model_name_or_path = {str(folder)!r}\ndata_path = 'd'\nseed = 78\n"
    )
    assert main(["train", str(tmp_path / "c.py"), "--dry-run", "--device", "cpu"]) == 2
    assert "Memory unknown" in capsys.readouterr().out


def test_what_is_known_of_a_model_follows_the_folder_and_its_content(tmp_path, monkeypatch):
    """In a notebook or a server, a relative path may later refer to another model."""
    chosen = settings("model")
    found = []
    for name, width in (("one", 32), ("two", 64), ("one", 96)):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        tiny_model_folder("model", hidden_size=width)
        weights = forecast(chosen, "cpu", recompute=False).footprint.weights
        found.append((facts_of(chosen).config.hidden_size, weights))
    assert [width for width, _ in found] == [32, 64, 96]
    assert found[0][1] < found[1][1] < found[2][1]
