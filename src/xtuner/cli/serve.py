"""`xtuner serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from xtuner.cli import _model
from xtuner.cli._heartbeat import heartbeat


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RUN",
            help="What `xtuner chat` takes: a work dir, a checkpoint, a model folder, or a name on "
            "the hub. For a run with an adapter, the base model is served too.",
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="Also serve this adapter, as the model BASE:NAME; repeatable.",
        ),
    ] = None,
    address: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks any free port.")] = 23333,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="XTUNER_API_KEY",
            help="Require this key from clients. Needed for addresses other than loopback.",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="Allow web pages of this origin to send requests; repeatable."
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Maximum number of answers generated at the same time.")
    ] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="Maximum number of waiting requests.")] = 64,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum length of an answer in tokens.")
    ] = 4096,
    max_seconds: Annotated[
        float, typer.Option(min=1, help="Time limit for an answer, in seconds.")
    ] = 600.0,
    max_request_mb: Annotated[
        float, typer.Option(min=0.01, help="Maximum size of a request, in MB.")
    ] = 20.0,
    temperature: Annotated[
        float,
        typer.Option(
            min=0, max=2, help="Temperature of requests that do not set one; OpenAI's default is 1."
        ),
    ] = 1.0,
    prompt_template: _model.PromptTemplate = None,
    system: _model.System = None,
    bits: _model.Bits = None,
    device: _model.DeviceOption = _model.Device.auto,
    dtype: _model.DtypeOption = _model.Dtype.auto,
    trust_remote_code: _model.TrustRemoteCode = False,
    trust_code: _model.TrustCode = False,
) -> None:
    """Serve a model with the OpenAI API.

    Serves /v1/models, /v1/chat/completions and /v1/completions, by default only to this machine.
    Requests are batched. Conversations are rendered with the template of the training run.
    """
    from xtuner.cli import _extras
    from xtuner.models.references import refuse_missing

    _extras.require("serve", "fastapi", "uvicorn")
    refuse_missing(model)
    typer.echo(f"Loading {model}...", err=True)
    with heartbeat():
        from xtuner.serve import listen
        from xtuner.serve.app import Defaults, make_app
        from xtuner.serve.engine import Engine
        from xtuner.serve.guard import ApiKey, Guard
        from xtuner.serve.job import Limits
        from xtuner.serve.models import open_models

    _extras.check_address(address, secret=api_key, flag="--api-key KEY")
    socket = listen.bind(address, port)
    with heartbeat():
        models = open_models(
            model,
            adapter or (),
            prompt_template=prompt_template,
            system=system,
            bits=bits,
            device=device.value,
            dtype=dtype.value,
            trust_remote_code=trust_remote_code,
            trust_code=trust_code,
        )
    engine = Engine(Limits(max_batch, max_queue, max_seconds))
    app = Guard(
        make_app(models, engine, Defaults(max_tokens, temperature)),
        address=address,
        credentials=ApiKey(api_key) if api_key else None,
        max_body=int(max_request_mb * 2**20),
        origins=tuple(allow_origin or ()),
        as_json=True,
    )
    typer.echo(f"Serving on {listen.address_of(socket)}/v1 (Ctrl-C stops):")
    for served in models:
        typer.echo(f"  {served.name}")
    listen.run(app, socket, on_end=engine.close)
