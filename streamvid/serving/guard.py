"""Who may talk to the server: checks of every request before any route sees it.

A page of another site can open a WebSocket to a server on the reader's own machine, and a name that
changes its address can fetch from it, whatever it is bound to. So ``Host`` must be a known name and
``Origin``, which browsers send, the server's own. A server that others can reach also demands a
token, as ``Authorization: Bearer``, or for browsers' WebSockets as the subprotocol
``bearer.TOKEN`` beside ``streamvid``.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Collection, Mapping
from types import MappingProxyType
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
SUBPROTOCOL = "streamvid"
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz"})
"""Need no token: the page, which has nothing in it, and the two checks."""
MOST_DIGITS = 20  # of a length; Python reads longer numbers slowly, or not at all
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
        " media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Refuses requests of strangers; adds the headers that bind a browser.

    Args:
        token: demanded of all but ``OPEN_PATHS`` and the page's own files; None demands none.
        hosts: names that ``Host`` may have; None allows any, which only a token makes safe.
        body_bytes: largest body.
        larger_bodies: paths, without a slash at the end, whose largest body is another.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str | None,
        hosts: Collection[str] | None,
        body_bytes: int,
        larger_bodies: Mapping[str, int] = MappingProxyType({}),
    ):
        if hosts is None and token is None:
            raise ValueError("any host is allowed but no token is set; set a token")
        self._app = app
        self._token = token
        self._hosts = hosts
        self._body_bytes = body_bytes
        self._larger_bodies = larger_bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 400, 401, 403 or 413."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(scope, send, *refusal)
            return
        if scope["type"] == "websocket":
            await self._app(scope, receive, send)
            return
        most = self._most_bytes(scope)
        try:
            await self._app(scope, _counted(receive, most), _with_headers(send))
        except _TooLarge:
            await _refuse(scope, send, 413, f"the body is larger than {most} bytes")

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        host = hostname(headers.get("host", ""))
        if self._hosts is not None and host not in self._hosts:
            return 403, "this server does not answer to that host name; see --allow-host"
        origin = headers.get("origin")
        if origin is not None and urlsplit_netloc(origin) != headers.get("host", "").lower():
            return 403, "requests of other sites are refused"
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return 400, "content-length is no number"
        most = self._most_bytes(scope)
        if len(length) > MOST_DIGITS or int(length) > most:
            return 413, f"the body is larger than {most} bytes"
        path = scope["path"]
        is_open = path in OPEN_PATHS or path.startswith("/page/")
        if scope["type"] == "websocket" and is_open:
            return 404, "there is no WebSocket at this path"  # files know no WebSockets
        if self._token is not None and not is_open and not self._has_token(headers):
            return 401, "a token is needed: Authorization: Bearer TOKEN"
        return None

    def _has_token(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            offered = [p.strip() for p in headers.get("sec-websocket-protocol", "").split(",")]
            given = next((p.removeprefix("bearer.") for p in offered if p[:7] == "bearer."), "")
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._token.encode())

    def _most_bytes(self, scope: Scope) -> int:
        """The largest body of a request."""
        return self._larger_bodies.get(scope["path"].rstrip("/"), self._body_bytes)


class _TooLarge(Exception):
    """A body without a length that goes on for too long."""


def _counted(receive: Receive, most: int) -> Receive:
    """A body without a length is counted as it comes."""
    got = 0

    async def counted() -> Message:
        nonlocal got
        message = await receive()
        got += len(message.get("body", b""))
        if got > most:
            raise _TooLarge
        return message

    return counted


def hostname(host: str) -> str:
    """The name in a ``Host`` header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def urlsplit_netloc(origin: str) -> str:
    """Host and port of an ``Origin`` header; "" for ``null`` and nonsense."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def error_body(status: int, message: str) -> dict[str, object]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": str(status)}}


def _with_headers(send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await send(message)

    return with_headers


async def _refuse(scope: Scope, send: Send, status: int, reason: str) -> None:
    if scope["type"] == "websocket":  # before it is accepted: HTTP 403
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    body = json.dumps(error_body(status, reason)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    start = {"type": "http.response.start", "status": status, "headers": headers}
    await _with_headers(send)(start)
    await send({"type": "http.response.body", "body": body})
