"""An OpenAI-compatible HTTP server: who may ask, how errors look, how it starts and stops."""

from __future__ import annotations

import hmac
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import jinja2
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from coterie.errors import ArgumentError
from coterie.hf.serving.server import Server

GRACE = 30  # seconds that answers have to end when the server stops
KINDS = {401: "authentication_error", 404: "not_found_error"}


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which nobody can connect to yet. Raises ArgumentError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ArgumentError(f"cannot serve at {host}:{port}: {error.strerror or error}") from None
    return bound


def run(server: Server, bound: socket.socket, api_key: str | None) -> None:
    """Serves until SIGINT or SIGTERM; then lets running answers end, for GRACE seconds at most."""
    show_errors(server.app)
    app = Guard(server.app, api_key) if api_key else server.app
    config = uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=GRACE)
    try:
        uvicorn.Server(config).run(sockets=[bound])
    except KeyboardInterrupt:
        pass
    finally:
        server.stop()


def error(status: int, message: str) -> JSONResponse:
    """An error as OpenAI's clients expect it."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


def show_errors(app: FastAPI) -> None:
    """Has every error of an application answered by `error`."""

    async def refused(request: Request, raised: HTTPException) -> JSONResponse:
        return error(raised.status_code, str(raised.detail))

    async def malformed(request: Request, raised: RequestValidationError) -> JSONResponse:
        return error(400, "; ".join(f"{each['type']}: {each['msg']}" for each in raised.errors()))

    async def untemplated(request: Request, raised: jinja2.TemplateError) -> JSONResponse:
        return error(400, f"the model's chat template refuses these messages: {raised}")

    async def failed(request: Request, raised: Exception) -> JSONResponse:
        return error(500, f"{type(raised).__name__}: {raised}")

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(jinja2.TemplateError, untemplated)
    app.add_exception_handler(Exception, failed)


class Guard:
    """Lets through what has the key, as "Authorization: Bearer KEY", and questions after /health."""

    def __init__(self, app: Callable[..., Awaitable[None]], key: str) -> None:
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                await error(401, "expected the server's API key in the Authorization header")(scope, receive, send)
                return
        await self._app(scope, receive, send)
