"""The contract: rows are kinds of model, columns are what must hold for each, in fp32 to 1e-5 relative.

`kinds.py` has the rows, `columns_*.py` the columns. Lengths are odd on purpose and the rows of a batch differ.
"""

from collections.abc import Callable

import pytest

from fusiontree.models import HybridLanguageModel
from fusiontree.ops import native
from tests.models import columns_cache, columns_packing, columns_padding, columns_use
from tests.models.kinds import KINDS, shared_model

COLUMNS = [*columns_cache.COLUMNS, *columns_padding.COLUMNS, *columns_packing.COLUMNS, *columns_use.COLUMNS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("holds", COLUMNS, ids=lambda holds: holds.__name__)
def test_contract(kind: str, holds: Callable[[HybridLanguageModel], None]) -> None:
    holds(shared_model(kind))


DECODING = [
    columns_cache.token_by_token_is_whole,
    columns_cache.rolled_back_is_never_advanced,
    columns_padding.padded_rows_generate_as_alone,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("holds", DECODING, ids=lambda holds: holds.__name__)
def test_decoding_without_native_kernels(
    kind: str, holds: Callable[[HybridLanguageModel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no compiler; the table above has run the same columns with the kernels, where there is one."""
    monkeypatch.setattr(native, "_kernels", dict)
    holds(shared_model(kind))
