"""`xtuner chat`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from xtuner.cli import _chat_tools, _model, _sampling
from xtuner.cli._heartbeat import heartbeat


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint (work_dirs/.../iter_N), a work dir (its newest checkpoint), an "
            "adapter, a model folder, or a name on the hub. Checkpoints record their base model "
            "and template.",
        ),
    ],
    adapter: _model.Adapter = None,
    prompt_template: _model.PromptTemplate = None,
    system: _model.System = None,
    visual_encoder: _model.VisualEncoder = None,
    llava: _model.Llava = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Attach this image to the first question; repeatable. In the conversation, a line "
            "IMAGE PATH attaches one to the next question.",
        ),
    ] = None,
    bits: _model.Bits = None,
    max_new_tokens: _model.MaxNewTokens = 512,
    temperature: _sampling.Temperature = None,
    top_k: _sampling.TopK = None,
    top_p: _sampling.TopP = None,
    repetition_penalty: _sampling.RepetitionPenalty = None,
    seed: _sampling.Seed = None,
    stop_words: _sampling.StopWords = None,
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
    tools: _chat_tools.Tools = None,
    yes: _chat_tools.Yes = False,
    max_rounds: _chat_tools.MaxRounds = 8,
    tool_timeout: _chat_tools.ToolTimeout = 30.0,
    lagent: _chat_tools.Lagent = False,
    with_plugins: _chat_tools.WithPlugins = None,
    device: _model.DeviceOption = _model.Device.auto,
    dtype: _model.DtypeOption = _model.Dtype.auto,
    trust_remote_code: _model.TrustRemoteCode = False,
    trust_code: _model.TrustCode = False,
) -> None:
    """Chat with a model.

    Uses the prompt template that the model was trained with. End a question with a blank line. EXIT
    quits, RESET starts a new conversation, Ctrl-C stops an answer. Questions can also be piped in,
    separated by blank lines.
    """
    from xtuner.device.environment import set_up_threads
    from xtuner.models.references import refuse_missing

    named = _chat_tools.names(tools or (), lagent=lagent, with_plugins=with_plugins or ())
    _chat_tools.check(named, yes=yes, can_ask=sys.stdin.isatty())
    refuse_missing(model)
    typer.echo(f"Loading {model}...", err=True)
    set_up_threads()

    with heartbeat():
        from xtuner.chat.opening import open_chat
        from xtuner.chat.terminal import Terminal
        from xtuner.generation.generate import GenerationOptions

    options = GenerationOptions(
        max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, tuple(stop_words or ())
    )
    _sampling.note_without_effect(options)
    with heartbeat():
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
    terminal = Terminal.standard(
        streaming=not no_streamer, images=tuple(image or ()), waiting=heartbeat
    )
    with _chat_tools.opened(
        session, terminal, named, yes=yes, max_rounds=max_rounds, timeout=tool_timeout
    ):
        if ask:
            terminal.ask_all(session, ask)
        else:
            terminal.converse(session)
