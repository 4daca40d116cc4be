"""An input embedding whose rows stay in the CPU's memory while the model is on a GPU.

A step reads a few thousand of its rows, 16 MiB for 2,048 tokens of width 4,096, and multiplies
nothing with it. Of a model with many words it is large: 723 MiB in InternLM2-7B, a tenth of what
QLoRA takes there in all. The numbers are the same; a step waits for the copy of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtuner.errors import ModelError


class HostEmbedding(nn.Module):
    """Rows of a frozen embedding, given on the device that asks for them.

    The rows are no parameter: ``model.to(device)`` leaves them where they are, they are not
    trained or saved, and the model's first parameter still tells on which device it computes.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self._rows = weight.detach().to("cpu")
        self.num_embeddings, self.embedding_dim = self._rows.shape

    @property
    def weight(self) -> Tensor:
        """``[V, H]``, in the CPU's memory."""
        return self._rows

    def forward(self, ids: Tensor) -> Tensor:
        """Map ``[..., N]`` to ``[..., N, H]`` on the device of `ids`."""
        return F.embedding(ids.to("cpu"), self._rows).to(ids.device)


def can_stay_on_cpu(model: Any, trained: Sequence[str] = ()) -> bool:
    """Whether the input embedding of `model` is a plain one that the head does not share.

    Args:
        model: of transformers, before adapters.
        trained: names of modules that get adapters or are trained in full; then not.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {n.rpartition(".")[2] for n, module in model.named_modules() if module is embedding}
    if names & {name.rpartition(".")[2] for name in trained}:
        return False
    shared = head is not None and getattr(head, "weight", None) is embedding.weight
    return type(embedding) is nn.Embedding and embedding.max_norm is None and not shared


def bytes_to_leave(model: Any, trained: Sequence[str]) -> int:
    """Size of the input embedding, 0 where it cannot stay on the CPU; arguments as
    `can_stay_on_cpu`."""
    if not can_stay_on_cpu(model, trained):
        return 0
    rows = model.get_input_embeddings().weight
    return int(rows.numel() * rows.element_size())


def install(model: Any, trained: Sequence[str] = ()) -> None:
    """Put a `HostEmbedding` in the place of the input embedding; arguments as `can_stay_on_cpu`.

    Raises:
        ModelError: it is of another kind, or trained, or the output head shares its weights.
    """
    if not can_stay_on_cpu(model, trained):
        raise ModelError(
            "embedding_on_cpu = True: this model's input embedding cannot be apart from the rest: "
            "its output head has the same weights, or it is trained, or does more than look up "
            "rows. Set embedding_on_cpu = False"
        )
    model.set_input_embeddings(HostEmbedding(model.get_input_embeddings().weight))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the memory that it had
