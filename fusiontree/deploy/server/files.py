"""The page's files, as they lie in the package, and the form that asks for the key."""

from __future__ import annotations

from importlib import resources

from starlette.responses import Response

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Nothing from elsewhere, no inline script: what a model writes can never become one.
POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_FOLDER = resources.files("fusiontree.deploy.server") / "page"


def names() -> list[str]:
    """The files that may be asked for."""
    return sorted(item.name for item in _FOLDER.iterdir() if item.name[item.name.rfind(".") :] in TYPES)


def page_file(name: str, status: int = 200) -> Response:
    """One of `names` as a response."""
    content = (_FOLDER / name).read_bytes()
    return Response(content, status, HEADERS, f"{TYPES[name[name.rfind('.') :]]}; charset=utf-8")


def key_page(status: int, wrong: bool = False) -> Response:
    """The form that asks for the key; it needs no other file, for those are behind the key."""
    text = (_FOLDER / "key.html").read_text("utf-8").replace("<body>", '<body class="wrong">' if wrong else "<body>")
    headers = {**HEADERS, "Content-Security-Policy": POLICY.replace("'self'", "'none'; style-src 'unsafe-inline'", 1)}
    return Response(text, status, {**headers, "WWW-Authenticate": "Bearer"}, "text/html; charset=utf-8")
