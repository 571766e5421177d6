"""SECURITY.md names for each threat a test: those files exist, and each holds a test."""

import re

from tests.conftest import REPOSITORY

TEXT = re.sub(r"<!--.*?-->", "", (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def rows() -> list[list[str]]:
    """The cells of the table of threats."""
    lines = [line.strip("|").split("|") for line in TEXT.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def test_every_threat_has_a_measure_and_a_test_that_is_there():
    assert len(rows()) >= 20
    for threat, measure, tests in rows():
        named = re.findall(r"`([^`]+)`", tests)
        assert threat and measure and named, threat
        for name in named:
            assert "def test_" in (REPOSITORY / "tests" / name).read_text(encoding="utf-8"), name


def test_every_file_that_is_named_is_there():
    named = re.findall(r"`((?:tests|tools|qlora_lite|recipes)/[^`]*)`", TEXT)
    assert len(named) > 3 and [name for name in named if not (REPOSITORY / name).exists()] == []


def test_the_tests_of_this_folder_are_named():
    for path in (REPOSITORY / "tests" / "security").glob("test_*.py"):
        assert f"`security/{path.name}`" in TEXT or path.name == "test_security_md.py"
