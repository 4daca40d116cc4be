"""An input embedding in CPU memory gives the same results as one on the device of the model."""

import pytest
import torch
from losses import loss_of

from xtuner.config.combinations import check_combinations
from xtuner.config.schema import Settings
from xtuner.errors import ModelError
from xtuner.kernels import host_embedding
from xtuner.kernels.host_embedding import HostEmbedding
from xtuner.memory.plan import plan_memory
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.prepare import make_trainable
from xtuner.testing.tiny import tiny_model, tiny_model_folder
from xtuner.types import Batch

MB = 2**20


def settings(folder, **changes):
    return Settings(
        **{
            "pretrained_model_name_or_path": str(folder),
            "data_path": "d",
            "tuning": "lora",
            "lora_r": 4,
            "max_length": 128,
            **changes,
        }
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_loss_and_gradients_are_the_same(tiny_model_path, tuning, recompute):
    ids = torch.arange(24)[None]
    batch = Batch(ids, ids.clone(), ids.clone(), torch.tensor([0, 24], dtype=torch.int32))
    found = []
    for on_cpu in (False, True):
        model = make_trainable(
            settings(tiny_model_path, tuning=tuning),
            dtype=torch.float32,
            device="cpu",
            recompute=recompute,
            embedding_on_cpu=on_cpu,
        )
        wrapped = PackedCausalLM(model.train())
        assert wrapped.verify() is None
        embedding = model.get_base_model().get_input_embeddings()
        assert isinstance(embedding, HostEmbedding) == on_cpu
        loss = loss_of(wrapped, batch)
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append((loss.detach(), grads))
    (loss, grads), (other, others) = found
    assert torch.equal(loss, other) and grads.keys() == others.keys()
    assert all(torch.equal(grad, others[name]) for name, grad in grads.items())


def test_it_is_neither_moved_nor_saved():
    model = tiny_model()
    rows = model.get_input_embeddings().weight.detach().clone()
    host_embedding.install(model)
    assert not any("embed" in name for name in model.state_dict())
    model.to("meta")
    assert model.device.type == "meta"
    assert torch.equal(model.get_input_embeddings().weight, rows)


def test_rows_are_moved_to_the_device_of_the_ids():
    class OnMeta(torch.Tensor):
        """Ids that report another device."""

        device = torch.device("meta")

        def to(self, device):
            assert device == "cpu"
            return torch.Tensor.to(self.as_subclass(torch.Tensor), device)

    embedding = HostEmbedding(torch.randn(5, 3))
    found = embedding(torch.tensor([[1, 4]]).as_subclass(OnMeta))
    assert found.shape == (1, 2, 3) and found.device.type == "meta"


@pytest.mark.parametrize("options", [{"tie_word_embeddings": True}, {"model_type": "gemma2"}])
def test_an_embedding_that_cannot_stay_on_the_cpu_is_an_error(options):
    model = tiny_model(**options)
    with pytest.raises(ModelError, match="embedding_on_cpu = False"):
        host_embedding.install(model)


@pytest.fixture(scope="module")
def large_vocabulary(tmp_path_factory):
    """A model folder with a large vocabulary."""
    return tiny_model_folder(
        tmp_path_factory.mktemp("large_vocabulary"), hidden_size=512, vocab_size=20000
    )


def test_auto_leaves_it_on_the_cpu_only_if_necessary(large_vocabulary):
    chosen, size = settings(large_vocabulary, max_length=4096), 20000 * 512 * 2
    plenty = plan_memory(chosen, "cuda", memory=2**40)
    assert not plenty.forecast.embedding_on_cpu
    tight = plan_memory(chosen, "cuda", memory=plenty.forecast.peak - 2 * MB)
    assert tight.fits and tight.forecast.embedding_on_cpu and not tight.forecast.recompute
    assert size <= plenty.forecast.peak - tight.forecast.peak
    last = plan_memory(chosen, "cuda", memory=MB)
    assert not last.fits and last.forecast.embedding_on_cpu and last.forecast.recompute
    assert any(f"{size / MB:,.0f} MiB, stays in CPU memory" in line for line in tight.lines())
    always = plan_memory(settings(large_vocabulary, embedding_on_cpu=True), "cuda", memory=2**40)
    assert always.forecast.embedding_on_cpu and not always.forecast.recompute
    never = plan_memory(settings(large_vocabulary, embedding_on_cpu=False), "cuda", memory=MB)
    assert not never.forecast.embedding_on_cpu
    assert any("embedding_on_cpu = True" in line for line in never.hints())


def test_it_has_no_effect_on_a_cpu(large_vocabulary):
    for wanted in ("auto", True):
        plan = plan_memory(settings(large_vocabulary, embedding_on_cpu=wanted), "cpu", memory=MB)
        assert not plan.forecast.embedding_on_cpu
        assert not any("embedding_on_cpu" in line for line in plan.lines())


def test_a_tied_embedding_is_not_offered(tmp_path):
    folder = tiny_model_folder(
        tmp_path, hidden_size=512, vocab_size=20000, tie_word_embeddings=True
    )
    plan = plan_memory(settings(folder), "cuda", memory=MB)
    assert not plan.forecast.embedding_on_cpu
    assert not any("embedding_on_cpu" in line for line in plan.lines())


@pytest.mark.parametrize(
    "changes",
    [
        {"tuning": "full"},
        {"lora_modules_to_save": ["embed_tokens"]},
        {"lora_target_modules": ["q_proj", "model.embed_tokens"]},
    ],
    ids=str,
)
def test_a_trained_embedding_stays_on_the_device_of_the_model(large_vocabulary, changes):
    plan = plan_memory(settings(large_vocabulary, **changes), "cuda", memory=MB)
    assert not plan.embedding_on_cpu
    asked = settings(large_vocabulary, embedding_on_cpu=True, **changes)
    if "tuning" in changes:
        assert "embedding_on_cpu" in dict(check_combinations(asked))
    else:
        assert plan_memory(asked, "cuda", memory=2**40).embedding_on_cpu
        with pytest.raises(ModelError, match="output head, trained"):
            make_trainable(
                asked, dtype=torch.float32, device="cpu", recompute=False, embedding_on_cpu=True
            )
