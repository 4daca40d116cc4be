"""Queues, times and sizes are limited, and a disconnected client frees its slot."""

import threading
import time

import httpx
import openai
import pytest

from xtuner.generation.running import RunningBatch
from xtuner.serve.job import Limits

WHO = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}


@pytest.fixture
def held(monkeypatch):
    """Generation waits until the event is set; then it goes on slowly."""
    event, right = threading.Event(), RunningBatch.step

    def step(batch):
        event.wait(20)
        time.sleep(0.005)
        return right(batch)

    monkeypatch.setattr(RunningBatch, "step", step)
    yield event
    event.set()


def wait_for(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("this did not happen in 20 seconds")


def create(server, **options):
    return server.client.chat.completions.create(model="tiny", **{**WHO, **options})


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "complete"])
def test_disconnected_client_frees_its_slot(server, held, stream):
    body = {**WHO, "model": "tiny", "stream": stream, "max_tokens": 64}
    with httpx.Client() as client:
        request = client.build_request("POST", f"{server.url}/v1/chat/completions", json=body)
        request.extensions["timeout"] = {"read": 1.0, "connect": 5, "write": 5, "pool": 5}
        if stream:
            response = client.send(request, stream=True)
            next(response.iter_lines())
            assert server.engine.num_open == 1
            response.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.send(request)
    time.sleep(1.2)  # longer than the server waits between two checks of the connection
    held.set()
    wait_for(lambda: server.engine.num_open == 0)
    assert create(server, max_tokens=2).usage.completion_tokens <= 2


def test_a_full_queue_refuses(models, held, start_server):
    with start_server(models, limits=Limits(max_batch=1, max_queue=1)) as server:
        threads = [
            threading.Thread(target=create, args=(server,), kwargs={"max_tokens": 4})
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: server.engine.num_open == 2)
        with pytest.raises(openai.RateLimitError, match="try again later"):
            create(server)
        with pytest.raises(openai.RateLimitError):  # neither of two answers is started
            create(server, n=2)
        held.set()
        for thread in threads:
            thread.join()
        assert server.engine.num_open == 0


def test_an_answer_that_takes_too_long_is_given_up(models, held, start_server):
    with start_server(models, limits=Limits(max_seconds=0.1)) as server:
        threading.Timer(0.3, held.set).start()
        with pytest.raises(openai.InternalServerError) as error:
            create(server)
        assert error.value.status_code == 504 and error.value.body["code"] == "timeout"
        with pytest.raises(openai.APIError, match=r"more than 0\.1 s"):
            held.clear()
            threading.Timer(0.3, held.set).start()
            list(create(server, stream=True))


def test_error_ends_requests_but_not_the_server(server, monkeypatch, caplog):
    right = RunningBatch.step

    def broken(batch):
        raise ValueError("a fault")

    monkeypatch.setattr(RunningBatch, "step", broken)
    with pytest.raises(openai.InternalServerError) as error:
        create(server)
    assert error.value.body["message"].startswith("internal error")
    assert "a fault" in caplog.text
    monkeypatch.setattr(RunningBatch, "step", right)
    assert create(server, max_tokens=3).choices[0].message.content is not None
