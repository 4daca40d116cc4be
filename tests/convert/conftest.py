"""Checkpoints that tests must not write to."""

import pytest
from checkpoint_maker import write_adapter

from xtuner.models.run_info import RunInfo
from xtuner.models.save import save_model
from xtuner.testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, tiny_model_path):
    return write_adapter(tmp_path_factory.mktemp("work") / "iter_7", tiny_model_path)


@pytest.fixture(scope="session")
def full_checkpoint(tmp_path_factory, tiny_model_path):
    folder = tmp_path_factory.mktemp("full") / "iter_9"
    save_model(tiny_model(), folder)
    tiny_tokenizer().save_pretrained(folder)
    RunInfo("model", str(tiny_model_path), step=9).write(folder)
    (folder / "training_state.pt").write_bytes(b"state")
    return folder
