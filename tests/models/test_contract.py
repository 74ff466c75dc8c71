"""The contract: rows are kinds of model, columns are what must hold for each, in fp32 to 1e-5 relative.

`kinds.py` has the rows, `columns_*.py` the columns. Lengths are odd on purpose and the rows of a batch differ.
"""

from collections.abc import Callable

import pytest

from fusiontree.models import HybridLanguageModel
from tests.models import columns_cache, columns_packing, columns_padding, columns_use
from tests.models.kinds import KINDS, shared_model

COLUMNS = [*columns_cache.COLUMNS, *columns_padding.COLUMNS, *columns_packing.COLUMNS, *columns_use.COLUMNS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("holds", COLUMNS, ids=lambda holds: holds.__name__)
def test_contract(kind: str, holds: Callable[[HybridLanguageModel], None]) -> None:
    holds(shared_model(kind))
