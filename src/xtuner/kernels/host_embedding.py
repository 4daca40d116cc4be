"""An input embedding that stays in CPU memory while the model is on a GPU.

A step reads a few thousand of its rows, 16 MiB for 2,048 tokens of width 4,096, and multiplies
nothing with it. With a large vocabulary it is large: 723 MiB in InternLM2-7B, a tenth of the memory
of a QLoRA run. Results are unchanged; a step waits for the copy of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtuner.errors import ModelError


class HostEmbedding(nn.Module):
    """A frozen embedding in CPU memory that returns rows on the device of the ids.

    The weight is not a parameter: ``model.to(device)`` does not move it, it is neither trained nor
    saved, and the model's first parameter still has the device of the model.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self._rows = weight.detach().to("cpu")
        self.num_embeddings, self.embedding_dim = self._rows.shape

    @property
    def weight(self) -> Tensor:
        """``[V, H]``, in CPU memory."""
        return self._rows

    def forward(self, ids: Tensor) -> Tensor:
        """Map ``[..., N]`` to ``[..., N, H]`` on the device of `ids`."""
        return F.embedding(ids.to("cpu"), self._rows).to(ids.device)


def can_stay_on_cpu(model: Any, trained: Sequence[str] = ()) -> bool:
    """Whether the input embedding of `model` is a frozen `nn.Embedding` not tied to the head.

    Args:
        model: A transformers model, before adapters are added.
        trained: Names of modules that get adapters or are trained in full.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {n.rpartition(".")[2] for n, module in model.named_modules() if module is embedding}
    if names & {name.rpartition(".")[2] for name in trained}:
        return False
    shared = head is not None and getattr(head, "weight", None) is embedding.weight
    return type(embedding) is nn.Embedding and embedding.max_norm is None and not shared


def bytes_to_leave(model: Any, trained: Sequence[str]) -> int:
    """Size of the input embedding in bytes, or 0 if it cannot stay on the CPU; arguments as for
    `can_stay_on_cpu`."""
    if not can_stay_on_cpu(model, trained):
        return 0
    rows = model.get_input_embeddings().weight
    return int(rows.nbytes)


def install(model: Any, trained: Sequence[str] = ()) -> None:
    """Replace the input embedding by a `HostEmbedding`; arguments as for `can_stay_on_cpu`.

    Raises:
        ModelError: The embedding is of another class, trained, or tied to the output head.
    """
    if not can_stay_on_cpu(model, trained):
        raise ModelError(
            "embedding_on_cpu = True: the input embedding of this model cannot stay on the CPU: it "
            "is tied to the output head, trained, or not a plain nn.Embedding. "
            "Set embedding_on_cpu = False"
        )
    model.set_input_embeddings(HostEmbedding(model.get_input_embeddings().weight))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # release the memory of the old embedding
