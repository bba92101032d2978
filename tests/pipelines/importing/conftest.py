"""The weights of a consistency model."""

from pathlib import Path

import pytest
import torch
from foreign import ICT, Golden, golden


@pytest.fixture
def ict(shared: Path) -> Golden:
    return golden(shared, ICT)


@pytest.fixture
def file(ict: Golden, tmp_path: Path) -> Path:
    """The weights of a consistency model as their authors save them."""
    torch.save(ict.state, tmp_path / "ict.pt")
    return tmp_path / "ict.pt"
