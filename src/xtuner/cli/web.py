"""`xtuner web`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xtuner.cli import _chat_tools, _model
from xtuner.cli._heartbeat import heartbeat


def command(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|RUN",
            help="Models that are selected when the page opens: one, or two side by side. Each is "
            "what `xtuner chat` takes.",
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Compare MODEL with MODEL + this adapter."),
    ] = None,
    address: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks any free port.")] = 6006,
    auth: Annotated[
        str | None,
        typer.Option(
            metavar="USER:PASSWORD",
            envvar="XTUNER_WEB_AUTH",
            help="Require a user name and password instead of the token. Needed for addresses "
            "other than loopback.",
        ),
    ] = None,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Folder with the work dirs.")] = Path(
        "work_dirs"
    ),
    max_runs: Annotated[
        int,
        typer.Option(min=1, help="Maximum number of runs started from the page at the same time."),
    ] = 1,
    allow: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR", help="Let the page read models and data in this folder; repeatable."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another host name of this server; repeatable."),
    ] = None,
    tools: _chat_tools.Tools = None,
    yes: _chat_tools.Yes = False,
    max_rounds: _chat_tools.MaxRounds = 8,
    tool_timeout: _chat_tools.ToolTimeout = 30.0,
    device: _model.DeviceOption = _model.Device.auto,
    dtype: _model.DtypeOption = _model.Dtype.auto,
) -> None:
    """Open a web page for chat, training and runs.

    The page can read the current folder, the folder with the work dirs, that of fetched models, and
    those given with --allow.
    """
    import contextlib
    import os
    import tempfile

    from xtuner.cli import _extras
    from xtuner.errors import ConfigError

    _extras.require("web", "gradio", "fastapi", "uvicorn")
    _extras.check_address(address, secret=auth, flag="--auth USER:PASSWORD")
    user, separator, password = (auth or "").partition(":")
    if auth and not (user and separator and password):
        raise ConfigError("--auth: must be USER:PASSWORD")
    _chat_tools.check(tools or (), yes=yes, can_ask=True)
    typer.echo("Loading the page...", err=True)
    with heartbeat():
        from xtuner.serve import listen
        from xtuner.serve.engine import Engine
        from xtuner.serve.guard import Password

    socket = listen.bind(address, port)
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="xtuner-web-"))
        with heartbeat():
            from xtuner.web import app as web
            from xtuner.web.folders import Folders
            from xtuner.web.jobs import Jobs
            from xtuner.web.models import ModelPool
            from xtuner.web.site import Site
            from xtuner.web.turns import Turns

        os.environ["GRADIO_TEMP_DIR"] = temporary  # where gradio keeps uploads
        given = (*(model or ()), *([str(adapter)] if adapter else ()))
        folders = Folders.of(runs, [Path.cwd(), *(allow or ())])
        engine = Engine()
        pool = ModelPool(engine, folders, given=given, device=device.value, dtype=dtype.value)
        use = stack.enter_context(
            _chat_tools.tool_use(tools or (), max_rounds=max_rounds, timeout=tool_timeout)
        )
        jobs = Jobs(folders, most=max_runs)
        turns = Turns(always=yes)
        site = Site(engine, pool, folders, jobs, first=given[:2], tools=use, turns=turns)
        credentials = Password(user, password) if auth else web.new_token(socket.getsockname()[1])
        with heartbeat():
            app = web.make_app(
                site, address=address, credentials=credentials, hosts=tuple(allow_host or ())
            )
            for value in given[:2]:
                pool.open(value)
        query = "" if isinstance(credentials, Password) else f"/?token={credentials.token}"
        typer.echo(f"Open {listen.address_of(socket)}{query} (Ctrl-C stops)")
        listen.run(app, socket, on_end=engine.close)
