"""RESULTS.md has the figures of every benchmark, and the sections that it and the README name."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README = ((ROOT / name).read_text() for name in ("RESULTS.md", "README.md"))
SECTIONS = re.findall(r"^## .*\n(?:(?!## ).*\n)*", RESULTS, re.MULTILINE)


def lacking(results: str) -> set[str]:
    """Benchmarks whose command is not told, and sections that are named but not there."""
    scripts = [path for path in (ROOT / "bench").rglob("*.py") if "__main__" in path.read_text()]
    untold = {path.name for path in scripts if str(path.relative_to(ROOT)) not in results}
    named = re.findall(r'section "([^"]+)"', results + README)
    return untold | {name for name in named if f"## {name}\n" not in results}


def test_every_benchmark_has_its_figures():
    assert not lacking(RESULTS)


@pytest.mark.parametrize("file", ["peers.py", "million.py", "data_check.py", "predicting.py"])
def test_control_a_section_that_is_lost_is_missed(file):
    without = "".join(section for section in SECTIONS if f"bench/{file}" not in section)
    assert file in lacking(without)
