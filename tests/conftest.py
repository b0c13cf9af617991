"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server import serving

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real slices beside the checkout; the test is skipped where it is absent."""
    if not REAL.is_dir():
        pytest.skip(f"the real slices are not here: {REAL} does not exist")
    return REAL


@pytest.fixture
def server(monkeypatch):
    """A server on loopback that plays the public ones (tests/server.py)."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as running:
        yield running
