"""`xtuner test`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xtuner.cli import _settings


def command(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="The settings of the run: a file or a built-in name."
        ),
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A checkpoint or work dir. Default: the work dir of the settings."),
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="Also write the answers to test_outputs.txt in this folder.")
    ] = None,
    overrides: _settings.Overrides = None,
    trust_remote_code: _settings.TrustRemoteCode = False,
    trust_code: _settings.TrustCode = False,
) -> None:
    """Ask a checkpoint the questions of its settings.

    Prints the answers to evaluation_inputs, about evaluation_images if there are any.
    """
    from xtuner.chat.opening import open_chat
    from xtuner.data.images.url import image_path
    from xtuner.errors import ConfigError
    from xtuner.generation.generate import GenerationOptions

    loaded = _settings.load_any(
        config, overrides=overrides, trust_remote_code=trust_remote_code, trust_code=trust_code
    )
    s = loaded.settings
    if not s.evaluation_inputs:
        raise ConfigError(f"{config}: has no evaluation_inputs to ask")
    session = open_chat(
        checkpoint or loaded.work_dir(),
        system=s.evaluation_system,
        options=GenerationOptions(
            max_new_tokens=s.evaluation_max_new_tokens, stop_words=s.evaluation_stop_words
        ),
        device=s.device,
        trust_remote_code=s.trust_remote_code,
        trust_code=trust_code,
    )

    images = [
        image_path(name, data_root=s.data_root, folders=[loaded.folder])
        for name in s.evaluation_images
    ]
    images = images * len(s.evaluation_inputs) if len(images) == 1 else images
    lines: list[str] = []
    for number, question in enumerate(s.evaluation_inputs):
        session.reset()
        attached = images[number : number + 1]
        answer = "".join(session.ask(question, attached))
        lines += [*(f"Image: {name}" for name in attached), f"Q: {question}", f"A: {answer}", ""]
        typer.echo("\n".join(lines[-3 - len(attached) :]))
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
        file = work_dir / "test_outputs.txt"
        file.write_text("\n".join(lines), encoding="utf-8")
        typer.echo(f"Wrote {file}")
