"""Undisturbed runs that the disturbed ones are compared with."""

import sys
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import harness


@pytest.fixture(scope="session")
def plain(small) -> Path:
    """One process, undisturbed."""
    assert harness.run(small, harness.arguments(small, "plain")).process.exitcode == 0
    return small / "runs" / "plain"


@pytest.fixture(scope="session")
def plain_two(small) -> Path:
    """Two ranks, undisturbed."""
    assert harness.code_of(harness.ranks(small, harness.arguments(small, "plain-two"))) == 0
    return small / "runs" / "plain-two"


@pytest.fixture
def name(request) -> str:
    """A run name of a test's own."""
    words = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return f"{words[:50]}-{zlib.crc32(request.node.nodeid.encode()):08x}"
