"""`xtuner chat`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    """Number types to compute in."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint (work_dirs/.../iter_N), a work dir (its newest), an adapter, a "
            "model folder, or a name on the hub. A checkpoint knows its base model and template."
        ),
    ],
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="An adapter to put on MODEL.")
    ] = None,
    prompt_template: Annotated[
        str | None,
        typer.Option(metavar="T", help="How messages become a prompt, as in a settings file."),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="S", help="The system message.")] = None,
    visual_encoder: Annotated[
        str | None,
        typer.Option(metavar="CLIP", help="The vision tower of a LLaVA model, with --llava."),
    ] = None,
    llava: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Parts of a LLaVA model whose language model is MODEL."),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PICTURE",
            help="Show this image with the first question; repeatable. In a conversation, a line "
            "IMAGE PATH shows one with the next question.",
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="4|8|16",
            help="Bits a weight; left out: as in the training of the adapter, else 16.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(help="Draw the words; lower is soberer. Without it: the likeliest word."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from this many likeliest tokens only.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens of this probability only.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: repeat less what was said.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same answers where words are drawn.")
    ] = None,
    stop_words: Annotated[
        list[str] | None, typer.Option(help="End an answer at this text, too; repeatable.")
    ] = None,
    no_streamer: Annotated[
        bool, typer.Option("--no-streamer", help="Show an answer when it is complete.")
    ] = False,
    ask: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Print the answer to this and leave. Repeatable: the turns of one conversation; "
            "RESET begins another, 'IMAGE PATH' shows an image with the next.",
        ),
    ] = None,
    device: Annotated[
        Device, typer.Option(help="'auto' is a GPU where there is one.")
    ] = Device.auto,
    dtype: Annotated[
        Dtype, typer.Option(help="The number type of weights and computation.")
    ] = Dtype.auto,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with MODEL.")
    ] = False,
    trust_code: Annotated[
        bool,
        typer.Option(
            "--trust-code", help="Run the Python file that the checkpoint names as its template."
        ),
    ] = False,
) -> None:
    """Talk to a model, with the template that it was trained with.

    Type a question and an empty line. EXIT leaves, RESET forgets the conversation, Ctrl-C stops an
    answer. Questions may also come through a pipe, parted by empty lines.
    """
    from xtuner.chat.opening import open_chat
    from xtuner.chat.terminal import Terminal
    from xtuner.generation.generate import GenerationOptions

    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_words=tuple(stop_words or ()),
    )
    if idle := options.without_effect:
        flags = ", ".join("--" + name.replace("_", "-") for name in idle)
        typer.echo(f"Note: without --temperature, {flags} changes nothing.", err=True)
    session = open_chat(
        model,
        adapter=adapter,
        prompt_template=prompt_template,
        system=system,
        bits=bits,
        options=options,
        device=device.value,
        dtype=dtype.value,
        trust_remote_code=trust_remote_code,
        trust_code=trust_code,
        visual_encoder=visual_encoder,
        llava=llava,
    )
    terminal = Terminal.standard(streaming=not no_streamer, images=tuple(image or ()))
    if ask:
        terminal.ask_all(session, ask)
    else:
        terminal.converse(session)
