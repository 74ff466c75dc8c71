"""How much the server takes from whom, and for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from fusiontree.errors import ConfigError

_MAX_KEY = 4096


@dataclass(frozen=True)
class ServerSettings:
    """ConfigError for an impossible value. What one engine takes on at once is in `requests.Limits`."""

    keys: tuple[bytes, ...] = ()
    """Any of these opens every route; none: the server is open to all who reach it."""
    max_body_bytes: int = 4 * 1024 * 1024
    max_prompt_tokens: int | None = None
    """None: as many as the model has positions."""
    max_tokens: int | None = None
    """Tokens one answer may ask for; None: as many as the model has positions."""
    max_connections: int = 1000
    """One more closes the connection that has idled longest, or is refused when all are at work."""
    header_seconds: float = 10.0
    """From the first sign of a request to the end of its header."""
    body_seconds: float = 30.0
    """From the end of the header to the end of the body."""
    request_seconds: float = 600.0
    """From the end of the body to the last token."""
    stall_seconds: float = 30.0
    """How long a client may leave its answer unread."""
    drain_seconds: float = 30.0
    """What running requests get to finish after SIGTERM."""
    failure_seconds: float = 2.0
    """How long /health answers 503 between the death of an engine and the end of the process."""
    ping_seconds: float = 15.0
    """A stream without tokens carries a comment this often, so that proxies keep it open."""

    def __post_init__(self) -> None:
        for key in self.keys:
            if not key or len(key) > _MAX_KEY or key.strip() != key or any(byte < 32 for byte in key):
                raise ConfigError(f"the API key must be 1 to {_MAX_KEY} bytes without line breaks or outer blanks")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "keys" or value is None:
                continue
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{field.name} must be above 0; given {value!r}")
