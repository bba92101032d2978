"""A store for the tests of a file."""

import pytest

from pipelines.tracking import client as tracking


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A local sqlite store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(tracking.URI_VARIABLE, raising=False)
        return tracking.resolve_uri(tmp_path_factory.mktemp("local store"))
