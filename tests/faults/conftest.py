"""Undisturbed runs that the disturbed ones are compared with."""

import shutil
import sys
import zlib
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import harness


@pytest.fixture(scope="session")
def plain(small) -> Path:
    """One process, undisturbed."""
    assert harness.run(small, harness.arguments(small, "undisturbed")).process.exitcode == 0
    return small / "runs" / "undisturbed"


@pytest.fixture(scope="session")
def killed(small) -> Path:
    """A run that was killed after step 7, with checkpoints at 2, 3, 4 and 6."""
    fault = partial(harness.at, "train:update", harness.KILL, call=7, after=True)
    harness.run(small, harness.arguments(small, "killed"), fault)
    return small / "runs" / "killed"


@pytest.fixture
def stopped(small, killed, name) -> list[str]:
    """That run under this test's name; the command that goes on with it."""
    shutil.copytree(killed, small / "runs" / name)
    return harness.arguments(small, name)


@pytest.fixture(scope="session")
def plain_two(small) -> Path:
    """Two ranks, undisturbed."""
    assert harness.code_of(harness.ranks(small, harness.arguments(small, "undisturbed-two"))) == 0
    return small / "runs" / "undisturbed-two"


@pytest.fixture
def name(request) -> str:
    """A run name of a test's own."""
    words = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return f"{words[:50]}-{zlib.crc32(request.node.nodeid.encode()):08x}"
