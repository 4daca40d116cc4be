"""Images given by URL are downloaded once, within limits."""

import http.server
import threading

import pytest
from PIL import Image

from xtuner.data.images.files import open_image
from xtuner.data.images.url import fetched, is_url
from xtuner.errors import DataError


class Server(http.server.BaseHTTPRequestHandler):
    asked = 0
    content = b""

    def do_GET(self):
        type(self).asked += 1
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    Server.asked, Server.content = 0, (tmp_path / "red.png").read_bytes()
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_an_image_is_fetched_once(server):
    path = fetched(f"{server}/a.png")
    assert open_image(str(path)).size == (8, 8)
    assert fetched(f"{server}/a.png") == path
    assert Server.asked == 1
    assert fetched(f"{server}/b.png") != path


@pytest.mark.parametrize(
    ("path", "content", "reason"),
    [
        ("/missing", None, "404"),
        ("/a", b"no image", "is not usable as an image"),
        ("/a", b"x" * 3000, "more than 2,000 bytes"),
    ],
    ids=["missing", "not an image", "large"],
)
def test_unusable_download_is_reported_and_not_kept(server, tmp_path, path, content, reason):
    Server.content = content or Server.content
    with pytest.raises(DataError, match=reason) as caught:
        fetched(f"{server}{path}", most=2000)
    assert server in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.*"))
    assert len([p for p in (tmp_path / "cache").rglob("*") if p.is_file()]) == 0


def test_unreachable_server_is_reported():
    with pytest.raises(DataError, match="cannot be downloaded"):
        fetched("http://127.0.0.1:9/a.png", seconds=2)


def test_only_http_is_a_url():
    assert is_url("https://x/y.jpg") and is_url("http://x/y.jpg")
    assert not is_url("file:///etc/passwd") and not is_url("a.jpg")
