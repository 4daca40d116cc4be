"""A server with a tiny model and two adapters, on a free port of loopback."""

import contextlib
import threading
import time

import openai
import pytest
from tuned_makers import write_adapter

from xtuner.serve import listen
from xtuner.serve.app import Defaults, make_app
from xtuner.serve.engine import Engine
from xtuner.serve.guard import Guard
from xtuner.serve.job import Limits
from xtuner.serve.models import open_models
from xtuner.testing.tiny import tiny_model_folder


class Running:
    """A running server."""

    def __init__(self, url, models, engine):
        self.url, self.models, self.engine = url, models, engine
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)

    def model(self, name):
        """The served model of this name."""
        return next(model for model in self.models if model.name == name)


@contextlib.contextmanager
def running(models, *, limits=None, defaults=None, credentials=None, max_body=100_000, **guard):
    """Serve `models` in a thread."""
    engine = Engine(limits or Limits(max_batch=4, max_queue=8))
    app = make_app(models, engine, defaults or Defaults(max_tokens=64))
    app = Guard(
        app,
        address="127.0.0.1",
        credentials=credentials,
        max_body=max_body,
        as_json=True,
        **guard,
    )
    socket = listen.bind("127.0.0.1", 0)
    server = listen.server(app, shutdown_seconds=1)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        found = Running(listen.address_of(socket), models, engine)
        with found.client:
            yield found
    finally:
        server.should_exit = True
        thread.join()
        engine.close()


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """A folder with a base model and two runs on it, 'ada' and 'bob'."""
    root = tmp_path_factory.mktemp("served")
    base = tiny_model_folder(root / "tiny", initializer_range=0.3)
    write_adapter(root / "ada", base, seed=1, system="You are Ada.")
    write_adapter(root / "bob", base, seed=2)
    return root


@pytest.fixture(scope="session")
def models(tuned):
    """The base model and both adapters on the same weights."""
    return open_models(str(tuned / "ada"), [str(tuned / "bob")], dtype="float32")


@pytest.fixture(scope="session")
def server(models):
    """A server of `models`."""
    with running(models) as found:
        yield found


@pytest.fixture
def start_server():
    """Serves models inside a block."""
    return running
