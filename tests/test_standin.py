"""The checks in tests/standin: the program on a device that is not the CPU, in a process of their own (see tests/standin).

.venv/bin/python -m pytest tests/standin/check_program.py      one file of them, by hand
"""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import REPOSITORY
from tests.quick_folder import quick_folder

CHECKS = sorted((REPOSITORY / "tests" / "standin").glob("check_*.py"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[str]], str]:
    """What became of each test, by the name of its file, and what pytest printed. One process: each would import everything."""
    from tests import standin

    if standin.why_not() is not None:
        pytest.skip(standin.why_not())
    report = tmp_path_factory.mktemp("standin") / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        *map(str, CHECKS),
    ]
    with quick_folder("standin") as folder:
        command.append(f"--basetemp={folder / 'pytest'}")
        process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1800)
    output = process.stdout[-12_000:] + process.stderr[-2000:]
    assert report.is_file(), output
    outcomes = defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        problems = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes[case.get("classname", "").rpartition(".")[2]].append(problems[0] if problems else "passed")
    return outcomes, output


@pytest.mark.slow
@pytest.mark.parametrize("path", CHECKS, ids=[path.stem for path in CHECKS])
def test_the_program_works_on_a_device_that_is_not_the_cpu(path: Path, done: tuple[dict[str, list[str]], str]) -> None:
    outcomes, output = done
    assert set(outcomes[path.stem]) == {"passed"}, output
