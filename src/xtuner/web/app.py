"""The application: a page per language behind the guard, with only the routes that it needs.

gradio has many routes (files, proxies, recordings, editors). All but those below are blocked.
"""

from __future__ import annotations

import os
import re
import secrets

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported

import gradio as gr
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from xtuner import i18n
from xtuner.errors import XTunerError
from xtuner.runs import report
from xtuner.runs.folder import RunFolder
from xtuner.serve.guard import App, Credentials, Guard, Receive, Scope, Send, Token
from xtuner.web import page
from xtuner.web.site import Site

MAX_UPLOAD = 200 * 2**20
"""Bytes of an uploaded file."""
COOKIE = "xtuner_language"

_LANGUAGES = "|".join(i18n.LANGUAGES)
_ALLOWED = re.compile(
    rf"/|/language/({_LANGUAGES})|/report/[\w.-]+|/favicon\.ico"
    rf"|/({_LANGUAGES})(/|/config/?|/theme\.css|/assets/.*|/static/.*|/svelte/.*|/favicon\.ico"
    r"|/gradio_api/(queue/(join|data)|upload|upload_progress|file=.*|cancel|reset/?"
    r"|heartbeat/\w+|startup-events|app_id/?|info/?|theme\.css))?"
)
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def make_app(
    site: Site, *, address: str, credentials: Credentials, hosts: tuple[str, ...] = ()
) -> App:
    """The guarded application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/")
    async def index(request: Request) -> Response:
        return RedirectResponse(f"/{_language(request)}/", 303)

    @app.get("/favicon.ico")
    async def icon() -> Response:
        return Response(status_code=204)

    @app.get("/language/{language}")
    async def switch(language: str) -> Response:
        response = RedirectResponse(f"/{language}/", 303)
        response.set_cookie(COOKIE, language, max_age=365 * 86400, samesite="strict")
        return response

    @app.get("/report/{name}")
    def show_report(name: str, request: Request) -> Response:
        try:
            run = RunFolder(site.folders.work_dir(name))
            text = report.page(run, language=_language(request))
        except XTunerError as error:
            return PlainTextResponse(str(error), 404)
        return HTMLResponse(text)

    for language in i18n.LANGUAGES:
        gr.mount_gradio_app(
            app,
            page.build(site, language),
            f"/{language}",
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            show_error=False,
            max_file_size=MAX_UPLOAD,
            **page.look(),
        )
    return Guard(
        _Routes(app),
        address=address,
        credentials=credentials,
        max_body=MAX_UPLOAD + 2**20,
        hosts=hosts,
        headers=HEADERS,
    )


def _language(request: Request) -> str:
    chosen = request.cookies.get(COOKIE, "")
    accepted = request.headers.get("accept-language", "")
    return chosen if chosen in i18n.LANGUAGES else i18n.preferred(accepted)


def new_token(port: int) -> Token:
    """A token that nobody can guess, for the server on `port`."""
    return Token(secrets.token_urlsafe(24), cookie=f"xtuner_token_{port}")


class _Routes:
    """Lets through the routes that the page needs, and compresses nothing: on loopback that takes
    longer than it saves."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif not _ALLOWED.fullmatch(scope["path"]):
            response = PlainTextResponse("not found", 404)
            await response(scope, receive, send)
        else:
            headers = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]
            await self._app({**scope, "headers": headers}, receive, send)
