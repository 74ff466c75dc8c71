"""The API key: asked for on every route but /health, before anything of a body is read.

Programs send `Authorization: Bearer KEY`. A browser that opens the page without it gets 401 and a form that asks for
the key; the form posts it to /login, which answers with a cookie that no script can read and no other site can use. The
key never stands in an address, where logs and histories would keep it.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from fusiontree.deploy.server.errors import ApiError, response_of
from fusiontree.deploy.server.files import key_page

OPEN = ("/health", "/login")  # /login checks the key itself
COOKIE = "fusiontree"
COOKIE_SECONDS = 12 * 3600


class Auth:
    """Middleware that lets only those in who have a key."""

    def __init__(self, app: ASGIApp, keys: tuple[bytes, ...]) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.keys and scope["path"] not in OPEN:
            headers = Headers(scope=scope)
            if not (holds_key(self.keys, headers) or holds_cookie(self.keys, headers)):
                asks_for_page = scope["path"] == "/" and scope["method"] in ("GET", "HEAD")
                answer = key_page(401) if asks_for_page else response_of(no_key())
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)


def no_key() -> ApiError:
    """The answer to one without a key; the same whatever was wrong with it."""
    message = "Incorrect or missing API key. Send it as 'Authorization: Bearer KEY'."
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def matches(keys: tuple[bytes, ...], given: bytes) -> bool:
    """Whether `given` is one of the keys; takes as long whichever it is and however much of it is right."""
    found = [hmac.compare_digest(_digest(key), _digest(given)) for key in keys]
    return any(found)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # equal lengths: compare_digest leaks the length otherwise


def holds_key(keys: tuple[bytes, ...], headers: Headers) -> bool:
    """Whether the Authorization header carries a key; the scheme's case does not matter, the key's does."""
    scheme, _, given = headers.get("authorization", "").encode("latin-1").partition(b" ")
    return scheme.lower() == b"bearer" and matches(keys, given)


def new_cookie(keys: tuple[bytes, ...]) -> str:
    """The value of a cookie that is good for some hours, on a restarted server too."""
    until = str(int(time.time()) + COOKIE_SECONDS)
    return f"{until}.{_signature(keys[0], until)}"


def holds_cookie(keys: tuple[bytes, ...], headers: Headers) -> bool:
    """Whether the request carries a cookie of `new_cookie` that has not expired."""
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return False
    until, _, signature = cookie.value.partition(".") if cookie else ("", "", "")
    if not (until.isascii() and until.isdigit() and len(until) < 20 and int(until) > time.time()):
        return False
    return hmac.compare_digest(_signature(keys[0], until).encode(), signature.encode("utf-8", "replace"))


def _signature(key: bytes, until: str) -> str:
    return hmac.new(key, f"fusiontree page until {until}".encode(), hashlib.sha256).hexdigest()
