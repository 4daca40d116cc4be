"""Parts of LLaVA models on tiny models, without a training run."""

import torch

from xtuner.chat.opening import open_chat
from xtuner.generation.generate import GenerationOptions
from xtuner.models.load import load_model
from xtuner.models.run_info import RunInfo
from xtuner.models.vision.folder import save_projector
from xtuner.models.vision.llava import assemble
from xtuner.models.vision.tower import load_vision_tower


def write_parts_of(folder, llm, encoder, **info):
    """A checkpoint of a run that trained a projector; `info` goes into its run.yaml."""
    model = assemble(
        load_model(llm, dtype=torch.float32),
        load_vision_tower(encoder, dtype=torch.float32),
        image_token_id=261,
    )
    save_projector(model, folder / "projector")
    RunInfo("llava", str(llm), visual_encoder=str(encoder), **info).write(folder)
    return folder


def answer(model, question, *images, **options):
    """The answer in a chat, in float32."""
    options = {"dtype": "float32", **options}
    session = open_chat(
        str(model), options=GenerationOptions(max_new_tokens=8, temperature=0), **options
    )
    return "".join(session.ask(question, images))
