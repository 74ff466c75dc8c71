"""Text named on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusiontree.errors import ConfigError

if TYPE_CHECKING:
    from fusiontree.data import SourceConfig


def sources(paths: Sequence[str], **settings: Any) -> list[SourceConfig]:
    """One source per path; ConfigError names the first setting that is impossible."""
    from pydantic import ValidationError

    from fusiontree.data import SourceConfig

    try:
        return [SourceConfig(path=path, **settings) for path in paths]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}, given {first['input']!r}") from None
