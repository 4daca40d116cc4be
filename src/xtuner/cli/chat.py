"""`xtuner chat`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from xtuner.cli._heartbeat import heartbeat


class Device(StrEnum):
    """Devices."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    """Number types of weights and computation."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint (work_dirs/.../iter_N), a work dir (its newest checkpoint), an "
            "adapter, a model folder, or a name on the hub. Checkpoints record their base model "
            "and template."
        ),
    ],
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Adapter to load on MODEL.")
    ] = None,
    prompt_template: Annotated[
        str | None,
        typer.Option(metavar="T", help="Prompt template, as in a settings file."),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="S", help="System message.")] = None,
    visual_encoder: Annotated[
        str | None,
        typer.Option(metavar="CLIP", help="Vision tower of the LLaVA model; requires --llava."),
    ] = None,
    llava: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder with the LLaVA parts that were trained with MODEL."
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Attach this image to the first question; repeatable. In the conversation, a line "
            "IMAGE PATH attaches one to the next question.",
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="4|8|16",
            help="Bits per weight. Default: as in the training of the adapter, otherwise 16.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of an answer.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Sampling temperature; lower is more deterministic. Without it, decoding is "
            "greedy."
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the K most likely tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the most likely tokens with total probability P."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Values above 1 reduce repetition.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling.")] = None,
    stop_words: Annotated[
        list[str] | None, typer.Option(help="Also end answers at this string; repeatable.")
    ] = None,
    no_streamer: Annotated[
        bool, typer.Option("--no-streamer", help="Print each answer when it is complete.")
    ] = False,
    ask: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Print the answer to this question and exit. Repeatable: the turns of one "
            "conversation; RESET starts a new one, 'IMAGE PATH' attaches an image to the next "
            "question.",
        ),
    ] = None,
    tools: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOOL",
            help="Let the model call tools: my_tools.py (functions with type hints and "
            "docstrings), calculator, clock, solve, python_interpreter, read_file:FOLDER, or "
            "'mcp:COMMAND'; repeatable. Each call is shown and asked for.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Run calls without asking.")] = False,
    max_rounds: Annotated[
        int, typer.Option(min=1, help="Most answers with calls to one question.")
    ] = 8,
    tool_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that one call may take.")
    ] = 30.0,
    lagent: Annotated[
        bool,
        typer.Option(
            "--lagent", help="As in XTuner 0.x: --tools python_interpreter --tools calculator."
        ),
    ] = False,
    with_plugins: Annotated[
        list[str] | None,
        typer.Option(
            metavar="calculate|solve|search",
            help="As in XTuner 0.x: tools with the names of MOSS's plugins, Calculate and Solve.",
        ),
    ] = None,
    device: Annotated[
        Device, typer.Option(help="'auto' uses a GPU if there is one.")
    ] = Device.auto,
    dtype: Annotated[
        Dtype, typer.Option(help="Number type of weights and computation.")
    ] = Dtype.auto,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that ships with MODEL.")
    ] = False,
    trust_code: Annotated[
        bool,
        typer.Option(
            "--trust-code", help="Run the Python file that the checkpoint names as its template."
        ),
    ] = False,
) -> None:
    """Chat with a model.

    Uses the prompt template that the model was trained with. End a question with a blank line. EXIT
    quits, RESET starts a new conversation, Ctrl-C stops an answer. Questions can also be piped in,
    separated by blank lines.
    """
    from xtuner.device.environment import set_up_threads

    if sys.stderr.isatty():
        typer.echo(f"Loading {model}...", err=True)
    set_up_threads()

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
    from xtuner.cli import _chat_tools

    named = _chat_tools.names(tools or (), lagent=lagent, with_plugins=with_plugins or ())
    _chat_tools.check(named, yes=yes, can_ask=sys.stdin.isatty())
    if idle := options.without_effect:
        flags = ", ".join("--" + name.replace("_", "-") for name in idle)
        verb = "has" if len(idle) == 1 else "have"
        typer.echo(f"Note: {flags} {verb} no effect without --temperature.", err=True)
    with heartbeat(on=sys.stderr.isatty()):
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
    with _chat_tools.opened(session, terminal, named, yes=yes, max_rounds=max_rounds,
                            timeout=tool_timeout):  # fmt: skip
        if ask:
            terminal.ask_all(session, ask)
        else:
            terminal.converse(session)
