"""The page over HTTP: access, routes, and files that are not served."""

import contextlib
import http.client
import re

import httpx
import pytest

from xtuner import i18n
from xtuner.cli.app import main

pytest.importorskip("gradio")


@pytest.fixture
def client(web):
    with httpx.Client(base_url=web.url, cookies={web.cookie: web.token}, timeout=30) as found:
        yield found


def test_without_the_token_nothing_is_shown(web):
    for path in ("/", "/en/", "/en/config", "/report/ada", "/en/gradio_api/queue/data"):
        response = httpx.get(web.url + path)
        assert response.status_code == 401 and "address" in response.text
    opened = httpx.get(f"{web.url}/?token={web.token}")
    assert opened.status_code == 303 and web.token in opened.headers["set-cookie"]


def test_the_language_is_the_browsers_or_the_chosen_one(client, web):
    for header, path in (("zh-CN,zh", "/zh/"), ("en", "/en/"), ("fr", "/en/")):
        response = client.get("/", headers={"accept-language": header})
        assert response.headers["location"] == path
    assert "xtuner_language=zh" in client.get("/language/zh").headers["set-cookie"]
    cookie = f"{web.cookie}={web.token}; xtuner_language=zh"
    chosen = client.get("/", headers={"accept-language": "en", "cookie": cookie})
    assert chosen.headers["location"] == "/zh/"


@pytest.mark.parametrize("language", i18n.LANGUAGES)
def test_the_page_loads_nothing_from_elsewhere(client, language):
    response = client.get(f"/{language}/")
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    loaded = re.findall(r'(?:src|href)="(https?:)?//([^"/]+)', response.text)
    assert {host for _, host in loaded} <= {"gradio.app"}
    config = client.get(f"/{language}/config").json()
    assert i18n.words(language)("tab_train") in str(config)
    assert not config.get("analytics_enabled")


SECRETS = [
    "/en/gradio_api/file=/etc/passwd",
    "/en/gradio_api/file=../../../etc/passwd",
    "/en/gradio_api/file=%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "/en/gradio_api/file=/proc/self/environ",
    "/en/gradio_api/file=file:///etc/passwd",
    "/en/gradio_api/file={folder}/rows.jsonl",
    "/en/gradio_api/file={folder}/tiny/config.json",
    "/en/assets/../../../../../../etc/passwd",
    "/en/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/en/static/..%2f..%2f..%2f..%2fetc/passwd",
    "/report/..%2f..%2fetc",
    "/report/%2fetc",
]


@pytest.mark.parametrize("number", range(len(SECRETS)))
def test_files_of_the_machine_are_not_served(client, folder, number):
    response = client.get(SECRETS[number].format(folder=folder))
    assert response.status_code >= 400, response.text[:80]
    assert "root:" not in response.text and "messages" not in response.text


@pytest.mark.parametrize(
    "path",
    [
        "/docs", "/openapi.json", "/en/login", "/en/monitoring", "/en/monitoring/summary",
        "/en/gradio_api/proxy=https://example.org/", "/en/gradio_api/vibe-code",
        "/en/gradio_api/run-history/records", "/en/gradio_api/openapi.json", "/en/manifest.json",
        "/en/gradio_api/call/x", "/en/gradio_api/run/predict", "/en/gradio_api/file/etc/passwd",
    ],
    ids=["docs", "openapi", "login", "monitoring", "summary", "proxy", "vibe", "history", "schema",
         "manifest", "call", "run", "file"],
)  # fmt: skip
def test_routes_that_the_page_does_not_need_are_closed(client, path):
    assert client.get(path).status_code == 404
    assert client.post(path).status_code == 404


def test_other_hosts_and_origins_are_refused(client):
    assert client.get("/en/", headers={"host": "evil.example"}).status_code == 403
    join = "/en/gradio_api/queue/join"
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"},
                    {"sec-fetch-site": "cross-site"}):  # fmt: skip
        assert client.post(join, json={}, headers=headers).status_code == 403


def test_file_that_was_not_uploaded_is_rejected(client, folder, web):
    """An event whose payload names a file of the machine as an upload."""
    config = client.get("/en/config").json()
    uploads = [c["id"] for c in config["components"] if c["props"].get("elem_id") == "data-file"]
    event = next(d for d in config["dependencies"] if uploads[0] in d["inputs"])
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    values = [file if i == uploads[0] else "x" for i in event["inputs"]]
    body = {"data": values, "fn_index": event["id"], "session_hash": "abc"}
    assert client.post("/en/gradio_api/queue/join", json=body).status_code in (200, 422)
    with client.stream("GET", "/en/gradio_api/queue/data?session_hash=abc") as stream:
        text = "".join(stream.iter_text())
    assert '"success":false' in text and "root:" not in text
    assert not (folder / "runs" / "uploads").exists()


def test_uploads_are_limited(web):
    with contextlib.closing(http.client.HTTPConnection(web.url.removeprefix("http://"))) as raw:
        raw.putrequest("POST", "/en/gradio_api/upload")
        raw.putheader("Content-Length", str(10**10))
        raw.endheaders()
        assert raw.getresponse().status == 413


def test_the_report_of_a_run_in_the_chosen_language(client):
    assert "Sample answers" in client.get("/report/ada").text
    chosen = client.get("/report/ada", headers={"accept-language": "zh"})
    assert "示例回答" in chosen.text and "<script" not in chosen.text
    assert client.get("/report/nobody").status_code == 404


def test_another_address_needs_a_password(capsys, monkeypatch):
    monkeypatch.delenv("XTUNER_WEB_AUTH", raising=False)
    assert main(["web", "--address", "0.0.0.0"]) == 2
    assert "--auth" in capsys.readouterr().err
    assert main(["web", "--auth", "ada"]) == 2
    assert "USER:PASSWORD" in capsys.readouterr().err
