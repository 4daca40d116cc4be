"""Access control: what every request passes before the application sees it.

    request ──► Host? ──► Origin? ──► size? ──► credentials? ──► application

A server on loopback can be reached by every web page that is open on the same machine. Host and
Origin tell those requests apart: a page cannot forge them.
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import parse_qs, quote

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach a server that listens on `address`."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


class Credentials(Protocol):
    """Decides whether a request may pass."""

    def refusal(self, scope: Scope, headers: Mapping[str, str]) -> Refusal | None:
        """None if the request may pass."""
        ...


@dataclass(frozen=True)
class Refusal:
    """The answer to a request that does not pass: status, message, and further headers."""

    status: int
    message: str
    code: str = ""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ApiKey:
    """The header ``Authorization: Bearer KEY``."""

    key: str
    open_paths: tuple[str, ...] = ("/health",)

    def refusal(self, scope: Scope, headers: Mapping[str, str]) -> Refusal | None:
        """See `Credentials`."""
        if scope["path"] in self.open_paths:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _equal(given.strip(), self.key):
            return None
        message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
        return Refusal(401, message, "invalid_api_key", (("www-authenticate", "Bearer"),))


@dataclass(frozen=True)
class Password:
    """HTTP basic authentication."""

    user: str
    password: str

    def refusal(self, scope: Scope, headers: Mapping[str, str]) -> Refusal | None:
        """See `Credentials`."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        try:
            pair = base64.b64decode(given, validate=True).decode("utf-8")
        except ValueError:
            pair = ""
        if kind.lower() == "basic" and _equal(pair, f"{self.user}:{self.password}"):
            return None
        ask = (("www-authenticate", 'Basic realm="xtuner", charset="UTF-8"'),)
        return Refusal(401, "user name and password are missing or wrong", "", ask)


@dataclass(frozen=True)
class Token:
    """A token in the address, ``/?token=...``, that becomes a cookie of this browser.

    Attributes:
        token: The secret.
        cookie: Its name. Servers on other ports of the machine get the same cookies, so each needs
            a name of its own.
    """

    token: str
    cookie: str = "xtuner_token"

    def refusal(self, scope: Scope, headers: Mapping[str, str]) -> Refusal | None:
        """See `Credentials`."""
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        if _equal(query.get("token", [""])[0], self.token):
            cookie = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
            location = "/" + quote(scope["path"].lstrip("/"))
            return Refusal(303, "", "", (("set-cookie", cookie), ("location", location)))
        # not http.cookies, which stops reading at a cookie of another server that it cannot parse
        pairs = [pair.strip().partition("=") for pair in headers.get("cookie", "").split(";")]
        if any(name == self.cookie and _equal(value, self.token) for name, _, value in pairs):
            return None
        message = "open the complete address that `xtuner web` printed, with its token"
        return Refusal(401, message)


class Guard:
    """ASGI middleware that lets a request through to `app` or answers it.

    Args:
        app: The application.
        address: The server listens on it.
        credentials: What a request must present; None accepts everyone on loopback.
        max_body: Bytes of a request.
        origins: Further origins that may send requests, such as ``https://chat.example``.
        hosts: Further names of this server.
        headers: Headers that are added to every response.
        as_json: Errors in OpenAI's form rather than as text.
    """

    def __init__(
        self,
        app: App,
        *,
        address: str,
        credentials: Credentials | None,
        max_body: int,
        origins: Sequence[str] = (),
        hosts: Sequence[str] = (),
        headers: Mapping[str, str] | None = None,
        as_json: bool = False,
    ) -> None:
        self._app, self._credentials, self._max_body = app, credentials, max_body
        self._origins = frozenset(origins)
        own = LOOPBACK_NAMES if is_loopback(address) else (address,)
        # Whoever listens on all addresses has many names; the credentials, which are then
        # required, keep a page out that gave its name another address.
        self._any_host = address in ("0.0.0.0", "::", "")
        self._hosts = frozenset((*own, *hosts))
        self._headers, self._as_json = dict(headers or {}), as_json

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is None:
            await self._app(scope, self._limited(receive), self._with_headers(send))
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._refuse(refusal, send)

    def _refusal(self, scope: Scope, headers: Mapping[str, str]) -> Refusal | None:
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if not self._any_host and name.strip("[]").lower() not in self._hosts:
            return Refusal(403, f"the Host header {host!r} does not name this server", "host")
        if refusal := self._foreign(scope, headers, host):
            return refusal
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._max_body:
            return Refusal(413, f"a request may have at most {self._max_body:,} bytes", "too_large")
        return self._credentials.refusal(scope, headers) if self._credentials else None

    def _foreign(self, scope: Scope, headers: Mapping[str, str], host: str) -> Refusal | None:
        """Refuse a request that a page of another origin makes."""
        origin = headers.get("origin")
        if origin in self._origins:
            return None
        own = (f"http://{host}", f"https://{host}")
        if origin is not None and origin.lower() not in [o.lower() for o in own]:
            return Refusal(403, f"pages of {origin!r} may not send requests here", "origin")
        site = headers.get("sec-fetch-site", "none")
        opens_page = headers.get("sec-fetch-mode") == "navigate" and scope.get("method") == "GET"
        if site not in ("none", "same-origin") and not opens_page:
            return Refusal(403, "pages of other sites may not send requests here", "origin")
        return None

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that ends a body of unknown length at the limit."""
        received = 0

        async def limited() -> MutableMapping[str, Any]:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_body:
                    return {"type": "http.disconnect"}
            return message

        return limited

    def _with_headers(self, send: Send) -> Send:
        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                more = [(k.encode(), v.encode()) for k, v in self._headers.items()]
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        return with_headers

    async def _refuse(self, refusal: Refusal, send: Send) -> None:
        if self._as_json:
            kind = "authentication_error" if refusal.status == 401 else "invalid_request_error"
            error = {"message": refusal.message, "type": kind, "param": None, "code": refusal.code}
            body, content = json.dumps({"error": error}).encode(), "application/json"
        else:
            body, content = refusal.message.encode(), "text/plain; charset=utf-8"
        headers = [("content-type", content), *refusal.headers]
        encoded = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers]
        await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
        await send({"type": "http.response.body", "body": body})


def _equal(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())
