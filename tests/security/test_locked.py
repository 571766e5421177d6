"""The environment that tools/quickstart makes: every version locked with its hashes, nothing with a vulnerability known when it was locked.

The scripts run here with stand-ins for pip and pip-audit, or with pip on a wheel made on the spot: no connection.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

TOOLS = REPOSITORY / "tools"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
OF_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")  # whose files differ between CPUs and CUDA
ENTRY = re.compile(r"([a-z0-9-]+)==(\S+)(?: ; (.*?))? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)")


def entries(*names: str) -> list[Requirement]:
    """What the lock files pin, as `name==version ; marker`."""
    found = [match for name in names for match in ENTRY.finditer((TOOLS / name).read_text(encoding="utf-8"))]
    return [
        Requirement(f"{name}=={version} ; {marker}" if marker else f"{name}=={version}")
        for name, version, marker, _ in map(re.Match.groups, found)
    ]


def versions(locked: list[Requirement], python: str) -> dict[str, str]:
    """name -> version, as that Python takes it on Linux."""
    place = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    return {
        each.name: str(each.specifier).removeprefix("==")
        for each in locked
        if each.marker is None or each.marker.evaluate(place)
    }


def wanted(python: str) -> Iterator[Requirement]:
    """What pyproject.toml and constraints.txt ask for there."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    lines = (
        line.partition("#")[0].strip() for line in (TOOLS / "constraints.txt").read_text(encoding="utf-8").splitlines()
    )
    for text in (
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["dev"],
        *project["build-system"]["requires"],
        *filter(None, lines),
    ):
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            yield requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_everything_that_is_asked_for_is_locked_at_a_version_that_is_allowed(python):
    locked = versions(entries("lock.txt", "lock-dev.txt"), python)
    for requirement in wanted(python):
        name = requirement.name.lower().replace("_", "-")
        if name != "torch":
            assert requirement.specifier.contains(locked[name]), (
                f"{requirement}, locked is {locked[name]}: run tools/lock"
            )


@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_locked_needs_nothing_that_is_not(python):
    """By the metadata of what is installed here, of which the versions may differ: their requirements hardly do."""
    from importlib.metadata import PackageNotFoundError, requires

    locked = versions(entries("lock.txt", "lock-dev.txt"), python)
    for name in locked:
        try:
            needed = requires(name) or []
        except PackageNotFoundError:
            continue  # for another Python or system
        place = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
        missing = [text for text in map(Requirement, needed) if text.marker is None or text.marker.evaluate(place)]
        assert [str(text) for text in missing if text.name.lower().replace("_", "-") not in {*locked, "torch"}] == [], (
            name
        )


@pytest.mark.parametrize("name", ["lock.txt", "lock-dev.txt"])
def test_a_lock_file_is_nothing_but_versions_with_hashes(name):
    text = (TOOLS / name).read_text(encoding="utf-8")
    rest = "".join(line for line in ENTRY.sub("", text).splitlines(keepends=True) if not line.startswith("# "))
    assert rest == "" and len(entries(name)) > 40
    assert "://" not in text  # no address: pip asks the index that it is set up for
    assert [entry.name for entry in entries(name) if OF_TORCH.fullmatch(entry.name)] == []


# the scripts


def bash(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`code` after sourcing env.sh, with an environment folder of its own."""
    (tmp_path / "venv" / "bin").mkdir(parents=True, exist_ok=True)
    code = f'. "{TOOLS}/env.sh"; VENV="{tmp_path}/venv"; {code}'
    return subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )


def stand_in(path: Path, code: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)


def make_wheel(folder: Path) -> str:
    """A package without anything in it, and its SHA-256."""
    wheel, about = folder / "nothing_in_it-1.0-py3-none-any.whl", "nothing_in_it-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: nothing-in-it\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("is_right", [True, False], ids=["the locked hash", "another hash"])
def test_a_file_with_another_hash_than_the_locked_one_is_not_installed(tmp_path, is_right):
    sha256 = make_wheel(tmp_path)
    stand_in(tmp_path / "venv" / "bin" / "python", f'exec "{sys.executable}" "$@"')
    (tmp_path / "lock.txt").write_text(f"nothing-in-it==1.0 \\\n    --hash=sha256:{sha256 if is_right else '0' * 64}\n")
    place = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_TARGET": str(tmp_path / "target"),
        "PIP_CONFIG_FILE": os.devnull,
    }
    done = bash(f'install_locked "{tmp_path}/lock.txt"', tmp_path, **place)
    assert (tmp_path / "target" / "nothing_in_it-1.0.dist-info").is_dir() == is_right
    assert (done.returncode == 0) == is_right, done.stderr
    if not is_right:
        assert "DO NOT MATCH THE HASHES" in done.stderr and f"Got        {sha256}" in done.stderr


def test_the_environment_is_made_from_the_lock_then_torch_then_this_folder_and_anew_when_the_lock_changes(tmp_path):
    stand_in(tmp_path / "venv" / "bin" / "python", f'echo "$@" >>"{tmp_path}/calls"')
    for name in ("lock.txt", "lock-dev.txt"):
        shutil.copyfile(TOOLS / name, tmp_path / name)
    code = f'LOCK="{tmp_path}/lock.txt"; LOCK_DEV="{tmp_path}/lock-dev.txt"; make_env '
    assert bash(code + "dev", tmp_path).returncode == 0
    installs = [
        line.partition(" install ")[2] for line in (tmp_path / "calls").read_text().splitlines() if " install " in line
    ]
    assert installs == [
        f"--require-hashes --no-deps --only-binary :all: -r {tmp_path}/lock.txt",
        f"--require-hashes --no-deps --only-binary :all: -r {tmp_path}/lock-dev.txt",
        *re.findall(r"^torch==.*$", (TOOLS / "constraints.txt").read_text(), flags=re.MULTILINE),
        f"--no-deps --no-build-isolation -e {REPOSITORY}",
    ]
    assert "up to date" in bash(code, tmp_path).stderr and "up to date" in bash(code + "dev", tmp_path).stderr
    for name in ("lock.txt", "lock-dev.txt"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# changed\n")
        assert "up to date" not in bash(code + "dev", tmp_path).stderr
        assert "up to date" in bash(code + "dev", tmp_path).stderr


def audit(tmp_path: Path, answer: str) -> subprocess.CompletedProcess[str]:
    """tools/audit with a stand-in for pip-audit; `answer` is Python that sees `service` and `asked`, and leaves its answer in `found`."""
    name, version = re.findall(r"tool_env (pip-audit) ([\d.]+)", (TOOLS / "audit").read_text())[0]
    program = tmp_path / "program.py"
    program.write_text(
        "import json, sys\n"
        "words = sys.argv[1:]\n"
        "service = words[words.index('--vulnerability-service') + 1]\n"
        "asked = [line.split('==') for line in open(words[words.index('--requirement') + 1]).read().split()]\n"
        "assert len({name for name, _ in asked}) == len(asked)\n"
        f"{answer}\n"
        "print(json.dumps({'dependencies': found}))\n"
    )
    stand_in(tmp_path / "tools" / f"{name}-{version}" / "bin" / name, f'exec "{sys.executable}" "{program}" "$@"')
    environment = os.environ | {"QLORA_LITE_HOME": str(tmp_path)}
    return subprocess.run([TOOLS / "audit"], capture_output=True, text=True, env=environment, timeout=120)


CLEAN = "found = [{'name': name, 'version': version, 'vulns': []} for name, version in asked]"
BAD = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["9.9"]}


def test_an_audit_that_finds_nothing_says_how_much_it_looked_up(tmp_path):
    done = audit(tmp_path, CLEAN)
    num_locked = len({str(entry).partition(";")[0].strip() for entry in entries("lock.txt", "lock-dev.txt")})
    assert done.returncode == 0, done.stderr
    counted = re.search(r"(\d+) of (\d+) locked versions looked up at pypi: 0 known", done.stderr)
    assert counted and int(counted[1]) == int(counted[2]) > num_locked  # torch too


def test_an_audit_that_finds_something_names_it_and_fails(tmp_path):
    done = audit(
        tmp_path, f"{CLEAN}\nfor each in found:\n    if each['name'] == 'jinja2': each['vulns'] = [{json.dumps(BAD)}]"
    )
    assert done.returncode == 1
    assert (
        re.search(r"jinja2 \S+: PYSEC-1 CVE-1, closed by 9\.9", done.stderr)
        and "1 known vulnerabilities" in done.stderr
    )


@pytest.mark.parametrize(
    "answer", ["sys.exit('no connection')", "found = [{'name': name, 'skip_reason': 'not found'} for name, _ in asked]"]
)
def test_an_audit_without_a_database_says_that_nothing_was_learned(tmp_path, answer):
    done = audit(tmp_path, answer)
    assert done.returncode == 0
    assert "NOTHING WAS LEARNED" in done.stderr and "known vulnerabilities" not in done.stderr


def test_an_audit_asks_the_second_database_where_the_first_does_not_answer(tmp_path):
    done = audit(tmp_path, f"if service == 'pypi': sys.exit('no connection')\n{CLEAN}")
    assert done.returncode == 0 and "looked up at osv: 0 known" in done.stderr
