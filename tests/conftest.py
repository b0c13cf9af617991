"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real slices beside the checkout; the test is skipped where it is absent."""
    if not REAL.is_dir():
        pytest.skip(f"the real slices are not here: {REAL} does not exist")
    return REAL
