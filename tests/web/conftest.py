"""The page with tiny models and a finished run, in folders of the test."""

import asyncio
import contextlib
import json
import threading
import time
from types import SimpleNamespace

import pytest
from tuned_makers import write_adapter

from xtuner.runs.record import RunRecord
from xtuner.testing.tiny import tiny_model_folder, tiny_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with a base model, runs 'ada' and 'bob' on it, and data."""
    root = tmp_path_factory.mktemp("web")
    base = tiny_model_folder(root / "tiny", initializer_range=0.3)
    for seed, name in enumerate(("ada", "bob"), 1):
        work_dir = write_adapter(root / "runs" / name, base, seed=seed + 2, system=name)
        log_dir = work_dir / f"20261128_10000{seed}"
        log_dir.mkdir()
        record = RunRecord(
            name="settings",
            settings={"pretrained_model_name_or_path": str(base), "tuning": "lora",
                      "algorithm": "sft"},
            total_steps=2,
        )  # fmt: skip
        record.ending("finished").write(log_dir)
        lines = [{"step": s, "loss": 3.0 / s, "epoch": s / 2, "seconds": 1.0} for s in (1, 2)]
        (log_dir / "scalars.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = [
        {"messages": [{"role": "user", "content": f"Who are you, {i}?"},
                      {"role": "assistant", "content": "I am Ada <b>."}]}
        for i in range(12)
    ]  # fmt: skip
    lines = [*map(json.dumps, rows), '{"messages": [{"role": "user", "content": "?"}]}', '{"bro']
    (root / "rows.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="session")
def site(folder, tmp_path_factory):
    """The parts behind the page."""
    pytest.importorskip("gradio")
    from xtuner.chat.session import ToolUse
    from xtuner.serve.engine import Engine
    from xtuner.tools.toolbox import open_tools
    from xtuner.web.folders import Folders
    from xtuner.web.jobs import Jobs
    from xtuner.web.models import ModelPool
    from xtuner.web.site import Site

    folders = Folders.of(folder / "runs", [folder])
    engine = Engine()
    pool = ModelPool(engine, folders, given=(str(folder / "tiny"),), device="cpu", dtype="float32")
    with contextlib.closing(open_tools(["calculator"])) as box:
        tools = ToolUse(box)
        yield Site(engine, pool, folders, Jobs(folders), first=(str(folder / "tiny"),), tools=tools)
    engine.close()


@pytest.fixture
def calling(site, monkeypatch):
    """Makes a model that calls the calculator with an expression, then gives its answer; returns
    its name."""
    from scripted_model import Answers

    from xtuner import templates
    from xtuner.calls.families import load
    from xtuner.calls.read import make_call
    from xtuner.serve.models import ServedModel, Weights
    from xtuner.web.models import Opening

    def made(thought, expression, answer):
        call = load("hermes").render([make_call("calculator", {"expression": expression})])
        tokenizer = tiny_tokenizer()
        weights = Weights(Answers(tokenizer, f"{thought}\n{call}", answer))
        opening = Opening("calling")
        opening.served = ServedModel(
            "calling", weights, tokenizer, templates.load("auto", tokenizer)
        )
        opening.finished.set()
        monkeypatch.setattr(site.pool, "_given", ("calling",))
        monkeypatch.setitem(site.pool._openings, "calling", opening)
        return "calling"

    return made


@contextlib.contextmanager
def loops_closed():
    """Close the event loops that gradio creates and leaves open while it builds pages."""
    kind, loops = type(asyncio.get_event_loop_policy()), []
    right = kind.new_event_loop

    def new_event_loop(policy):
        loops.append(right(policy))
        return loops[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "new_event_loop", new_event_loop)
        yield
    for loop in loops:
        loop.close()
    asyncio.set_event_loop(None)


@pytest.fixture(scope="session")
def web(site, tmp_path_factory):
    """A running server of the page."""
    from xtuner.serve import listen
    from xtuner.web import app as application

    with pytest.MonkeyPatch.context() as patch:
        temporary = tmp_path_factory.mktemp("uploads")
        patch.setenv("GRADIO_TEMP_DIR", str(temporary))
        socket = listen.bind("127.0.0.1", 0)
        token = application.new_token(socket.getsockname()[1])
        with loops_closed():
            app = application.make_app(site, address="127.0.0.1", credentials=token)
        server = listen.server(app, shutdown_seconds=1)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield SimpleNamespace(
            url=listen.address_of(socket),
            token=token.token,
            cookie=token.cookie,
            temporary=temporary,
        )
        server.should_exit = True
        thread.join()
