"""The checks in tests/standin: the program on a device that is not the CPU, each file in a process of its own (see tests/standin).

.venv/bin/python -m pytest tests/standin/check_program.py      one of them, by hand
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

CHECKS = sorted((REPOSITORY / "tests" / "standin").glob("check_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", CHECKS, ids=[path.stem for path in CHECKS])
def test_the_program_works_on_a_device_that_is_not_the_cpu(path: Path) -> None:
    from tests import standin

    if standin.why_not() is not None:
        pytest.skip(standin.why_not())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]
