"""Prepares threads and kernels of a run, and describes them in one line."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from xtuner.config.schema import Settings
from xtuner.device import host
from xtuner.device.cores import bind_to_share
from xtuner.errors import count
from xtuner.kernels import compiled, threads
from xtuner.kernels.attention.summary import attention_line
from xtuner.kernels.fused import liger
from xtuner.models.load import located_config
from xtuner.parallel.processes import Processes


def prepare_computing(settings: Settings, processes: Processes, dtype: torch.dtype) -> str:
    """Prepare threads and kernels, and describe them."""
    return "; ".join(_prepared(settings, processes, dtype))


def _prepared(settings: Settings, processes: Processes, dtype: torch.dtype) -> Iterator[str]:
    on_cpu, wanted = processes.device.type == "cpu", settings.num_threads
    on_node = processes.world_size // processes.nodes
    bound = on_cpu and bind_to_share(processes.rank - processes.node_leader, on_node)
    if on_cpu and host.keep_freed_memory():
        host.ask_for_huge_pages()
    if on_cpu or wanted:  # a run on a GPU does not wait for measurements of CPU kernels
        line = threads.choose_threads(wanted, dtype, processes.world_size)
        yield f"{line}, on {count(bound, 'core')} of its own" if bound else line
    yield compiled.state() if on_cpu else liger.state(processes.device)


def choose_attention(s: Settings, processes: Processes, dtype: torch.dtype) -> str:
    """Choose the attention kernels, and describe them.

    Raises:
        ModelError: The model cannot be found.
    """
    config = located_config(s.pretrained_model_name_or_path, trust_remote_code=s.trust_remote_code)
    return attention_line(config, processes.device, dtype, implementation=s.attn_implementation)
