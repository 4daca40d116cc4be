"""The decoder recorded and replayed, against eager passes."""

import contextlib

import pytest
import torch
from replaying_recorder import ReplayingRecorder
from trainer_parts import random_batch

from xtuner.kernels.attention import packed as attention
from xtuner.models.adapters import add_adapter
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.graphs.capacity import Capacity, rounded
from xtuner.models.graphs.decoder import GraphedDecoder
from xtuner.testing.tiny import tiny_model

BATCHES = [
    random_batch(9, 20, 30),
    random_batch(21, 8, 31, seed=1),
    random_batch(40, 3, 15, seed=2),
]


def made(tuning="lora", recorder=None, **options):
    torch.manual_seed(0)
    model = tiny_model("llama", attn_implementation="sdpa")
    if tuning == "lora":
        model = add_adapter(
            model,
            r=4,
            alpha=8,
            dropout=0.0,
            target_modules=("all-linear",),
            modules_to_save=(),
            seed=0,
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    packed = PackedCausalLM(model)
    packed.causal.set_attn_implementation(attention.register())
    packed.train()
    said = []
    if recorder is not None:
        packed.graphs = GraphedDecoder(
            packed.decoder,
            module=packed.causal,
            parameters=packed.decoder_parameters,
            gradients=lambda parameters: [torch.zeros_like(p) for p in parameters],
            recorder=lambda: recorder,
            autocast=contextlib.nullcontext,
            report=said.append,
        )
    return packed, said


def gradients_of_steps(model, steps):
    """Losses and gradients of steps, each of several micro-batches."""
    found = []
    for step in steps:
        model.zero_grad(set_to_none=True)
        losses = []
        for batch in step:
            loss = -model(batch).sum()
            loss.backward()
            losses.append(float(loss.detach()))
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((losses, grads))
    return found


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_gives_the_losses_and_gradients_of_the_plain_pass(tuning):
    recorder = ReplayingRecorder()
    steps = [BATCHES[:1], BATCHES, BATCHES[1:]]
    model, said = made(tuning, recorder)
    found = gradients_of_steps(model, steps)
    wanted = gradients_of_steps(made(tuning)[0], steps)
    assert not said
    assert model.graphs.replays == 5  # all but the first micro-batch
    assert recorder.recorded == 2
    for (losses, grads), (right_losses, right_grads) in zip(found, wanted, strict=True):
        assert losses == pytest.approx(right_losses, rel=1e-5)
        assert grads.keys() == right_grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, right_grads[name], rtol=1e-4, atol=1e-4)


def test_records_again_for_more_or_longer_sequences():
    recorder = ReplayingRecorder()
    model, said = made("lora", recorder)
    long = [random_batch(*[20] * 9), random_batch(180)]
    gradients_of_steps(model, [[long[0]], [long[0]], [long[1]], [long[0]]])
    assert recorder.recorded == 4 and not said
    assert model.graphs.graph.capacity == Capacity(192, 16, 192)


def test_a_recording_that_keeps_its_inputs_is_not_used():
    model, said = made("lora", ReplayingRecorder("stale"))
    found = gradients_of_steps(model, [BATCHES, BATCHES])
    wanted = gradients_of_steps(made("lora")[0], [BATCHES, BATCHES])
    assert model.graphs.replays == 0
    assert "replayed outputs differ" in said[0]
    assert found[1][0] == pytest.approx(wanted[1][0], rel=1e-5)


def test_model_that_cannot_be_recorded_is_trained_eagerly():
    model, said = made("lora", ReplayingRecorder("wait"))
    found = gradients_of_steps(model, [BATCHES, BATCHES])
    wanted = gradients_of_steps(made("lora")[0], [BATCHES, BATCHES])
    assert found[1][0] == pytest.approx(wanted[1][0], rel=1e-5)
    assert len(said) == 1 and "not permitted when stream is capturing" in said[0]


def test_a_second_forward_pass_before_the_backward_pass_turns_graphs_off():
    model, said = made("lora", ReplayingRecorder())
    gradients_of_steps(model, [BATCHES, BATCHES])
    before = model.graphs.replays
    model.zero_grad()
    first, second = model(BATCHES[0]).sum(), model(BATCHES[1]).sum()
    assert model.graphs.replays == before + 1
    assert "before the backward pass of the previous row" in said[0]
    (first - second).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    plain, _ = made("lora")
    (plain(BATCHES[0]).sum() - plain(BATCHES[1]).sum()).backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_evaluation_and_passes_without_gradients_are_computed():
    model, _ = made("lora", ReplayingRecorder())
    gradients_of_steps(model, [BATCHES, BATCHES])
    before = model.graphs.replays
    with torch.no_grad():
        model(BATCHES[0])
    model.eval()
    model(BATCHES[0])
    assert model.graphs.replays == before


def test_forward_pass_without_backward_pass_does_not_block():
    model, _ = made("lora", ReplayingRecorder())
    gradients_of_steps(model, [BATCHES, BATCHES])
    before = model.graphs.replays
    model.zero_grad()
    model(BATCHES[0])  # its result is dropped
    model(BATCHES[1]).sum().backward()
    assert model.graphs.replays == before + 2


def test_weights_that_moved_are_recorded_again():
    recorder = ReplayingRecorder()
    model, _ = made("lora", recorder)
    gradients_of_steps(model, [BATCHES, BATCHES])
    parameter = model.decoder_parameters()[0]
    parameter.data = parameter.data.clone()
    gradients_of_steps(model, [BATCHES])
    assert recorder.recorded == 4


@pytest.mark.parametrize(
    "tokens, wanted", [(1, 64), (64, 64), (65, 128), (4050, 4096), (2049, 2176)]
)
def test_rows_are_filled_up_to_few_sizes(tokens, wanted):
    assert rounded(tokens) == wanted


def test_a_model_that_reads_token_ids_in_its_layers_is_known():
    """Gemma 3n has embeddings in every layer."""
    model, _ = made("full")
    table = torch.nn.Embedding(261, 32)

    def add(module, args, kwargs, output):
        if "input_ids" in kwargs:
            output.last_hidden_state = output.last_hidden_state + table(kwargs["input_ids"])
        return output

    assert model.reads_embeddings_alone()
    model.causal.base_model.register_forward_hook(add, with_kwargs=True)
    assert not model.reads_embeddings_alone()
