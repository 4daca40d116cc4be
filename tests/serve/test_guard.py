"""Rejected requests: foreign hosts and pages, large bodies, missing keys."""

import base64

import httpx
import pytest

from xtuner.cli import serve as command
from xtuner.cli.app import main
from xtuner.serve import listen
from xtuner.serve.guard import ApiKey, Guard, Password, Token, is_loopback

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "max_tokens": 2}


async def _echo(scope, receive, send):
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        size += len(message["body"])
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def ask(method="GET", path="/", *, host="127.0.0.1:80", credentials=None, content=None, **options):
    """The response of a guarded application."""
    import anyio

    address, headers = options.pop("address", "127.0.0.1"), options.pop("headers", {})
    guard = Guard(_echo, address=address, credentials=credentials, max_body=100, **options)

    async def send():
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            headers["host"] = host
            return await client.request(method, path, headers=headers, content=content)

    return anyio.run(send)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:6006", 200),
        ("localhost", 200),
        ("[::1]:80", 200),
        ("LOCALHOST:1", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:6006", 403),
        ("localhost:80@evil.example", 403),
        ("evil.example:127.0.0.1", 403),
        ("", 403),
    ],
    ids=["ip", "name", "ipv6", "upper", "foreign", "subdomain", "userinfo", "port", "none"],
)
def test_the_host_must_be_this_server(host, status):
    assert ask(host=host).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1:80"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:81"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "https://page.example"}, 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
        ({"sec-fetch-site": "same-origin"}, 200),
    ],
    ids=["none", "own", "foreign", "port", "null", "allowed", "image", "script", "link", "self"],
)
def test_pages_of_other_origins_are_refused(headers, status):
    assert ask(headers=headers, origins=("https://page.example",)).status_code == status


def test_a_form_of_another_page_cannot_post():
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert ask("POST", headers=headers).status_code == 403


def test_large_bodies_are_refused_with_and_without_a_length():
    async def parts():
        for _ in range(5):
            yield b"x" * 50

    assert ask("POST", content=b"x" * 100).text == "100"
    assert ask("POST", content=b"x" * 101).status_code == 413
    assert ask("POST", content=parts()).text in ("50", "100")
    assert ask("POST", headers={"content-length": "-1"}).status_code == 413


def basic(text):
    return {"authorization": "Basic " + base64.b64encode(text.encode()).decode()}


@pytest.mark.parametrize(
    ("credentials", "headers", "status"),
    [
        (ApiKey("k"), {}, 401),
        (ApiKey("k"), {"authorization": "Bearer x"}, 401),
        (ApiKey("k"), {"authorization": "Bearer k"}, 200),
        (Password("ada", "p:w"), {}, 401),
        (Password("ada", "p:w"), basic("ada:x"), 401),
        (Password("ada", "p:w"), {"authorization": "Basic %%%"}, 401),
        (Password("ada", "p:w"), basic("ada:p:w"), 200),
        (Token("t"), {}, 401),
        (Token("t"), {"cookie": "xtuner_token=x"}, 401),
        (Token("t"), {"cookie": "a=b; xtuner_token=t"}, 200),
        (Token("t"), {"cookie": 'other={"a": 1}; xtuner_token=t'}, 200),
        (Token("t"), {"cookie": "xtuner_token_1=t"}, 401),
    ],
    ids=["key none", "key wrong", "key", "password none", "password wrong", "password garbage",
         "password", "token none", "token wrong", "token", "token after garbage",
         "token of another"],
)  # fmt: skip
def test_credentials(credentials, headers, status):
    assert ask(headers=headers, credentials=credentials).status_code == status


def test_token_in_the_url_becomes_a_cookie():
    response = ask(path="/?token=t", credentials=Token("t"))
    assert response.status_code == 303 and response.headers["location"] == "/"
    cookie = response.headers["set-cookie"]
    assert cookie.startswith("xtuner_token=t;")
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    elsewhere = ask(path="/%2Fexample.org/?token=t", credentials=Token("t"))
    assert elsewhere.headers["location"] == "/example.org/"


def test_loopback():
    assert all(map(is_loopback, ["127.0.0.1", "127.3.2.1", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.0.2", "example.org", ""]))


def test_the_api_answers_refusals_in_its_own_form(start_server, models):
    with start_server(models, credentials=ApiKey("k"), max_body=1000) as server:
        chat = f"{server.url}/v1/chat/completions"
        missing = httpx.post(chat, json=BODY)
        assert missing.status_code == 401
        assert missing.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
        key = {"Authorization": "Bearer k"}
        assert httpx.post(chat, json=BODY, headers=key).status_code == 200
        large = {**BODY, "messages": [{"role": "user", "content": "x" * 2000}]}
        assert httpx.post(chat, json=large, headers=key).status_code == 413
        plain = {**key, "content-type": "text/plain"}
        assert httpx.post(chat, content=str(BODY), headers=plain).status_code == 400
        assert httpx.get(f"{server.url}/docs", headers=key).json()["error"]["code"] == "not_found"


def test_the_command_serves_on_loopback_and_elsewhere_only_with_a_key(tuned, capsys, monkeypatch):
    monkeypatch.delenv("XTUNER_API_KEY", raising=False)
    assert main(["serve", str(tuned / "ada"), "--address", "0.0.0.0"]) == 2
    assert "--api-key" in capsys.readouterr().err
    seen = []

    def run(app, socket, *, on_end):
        seen.append(socket.getsockname()[0])
        socket.close()
        on_end()

    monkeypatch.setattr(listen, "run", run)
    options = ["--port", "0", "--adapter", f"robert={tuned / 'bob'}", "--dtype", "float32"]
    assert command.command and main(["serve", str(tuned / "ada"), *options]) == 0
    said = capsys.readouterr().out
    assert seen == ["127.0.0.1"] and "http://127.0.0.1:" in said
    assert said.split()[-3:] == ["tiny", "tiny:ada", "tiny:robert"]
