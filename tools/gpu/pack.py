"""Pack what this project needs on a machine with a CUDA card and no network: `tools/gpu_check --pack DIR`.

    in    an empty or new folder; tools/lock.txt and lock-dev.txt; a connection to a package index
    out   folder/*.whl, of the locked versions, each checked against its hash in the lock file; folder/README.txt,
          with the two commands to run there and what that machine must have already
    raises PackError, in one sentence; the folder is then left as it was

That machine runs Linux on x86-64 with glibc 2.39, and has torch for CUDA 13 with the usual packages around it. The pack
holds three kinds of package: those that it lacks, those that it has too old, and small ones whose version there is not
known to be in the range that we or another packed package ask for. Left out is what is there in a version that fits
(torch, numpy, accelerate, tokenizers, safetensors, and what these ask for as we do), and pyarrow, which is too large:
its version there must be looked at (README.txt has every range).

Surprising: bitsandbytes is not its published wheel. That holds a native library for every CUDA, ROCm and XPU release
(43 MB); the pack keeps the Python files, the library for CUDA 13.0 and the one for CPUs (4 MB), with a RECORD that says
so. Its hash was checked before that. And one wheel is made here: `qlora-lite` with its metadata alone, because the code
runs from the checkout there, but asks for its own version and for the ranges of its libraries.
"""

import argparse
import base64
import csv
import hashlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

REPO = Path(__file__).resolve().parents[2]
LOCKS = ("lock.txt", "lock-dev.txt")  # the first that has a name decides
ENTRY = re.compile(r"([a-z0-9-]+)==(\S+)(?: ; (.*?))? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)")

MISSING = (
    "bitsandbytes",
    *("datasets", "dill", "multiprocess"),
    "gguf",
    "ijson",
    *("httpx2", "httpcore2", "truststore"),
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    # pytest imports every test file, with -m gpu too
    *("jsonschema", "jsonschema-specifications", "referencing", "rpds-py"),
)
TOO_OLD = ("transformers", "huggingface-hub")  # 5.17 and 1.33 there
MAY_NOT_FIT = (
    *("typing-extensions", "idna"),  # pydantic and httpx2 ask for releases of 2026
    "fsspec",  # datasets allows none newer than the locked one
    *("peft", "typer", "rich", "filelock", "jinja2", "packaging", "psutil", "pyyaml"),  # our own ranges
    *("anyio", "h11", "tqdm"),  # httpx2, httpcore2 and datasets
)
PACKED = (*MISSING, *TOO_OLD, *MAY_NOT_FIT)
TESTED_WITH = ("pytest", "hypothesis", "jsonschema")  # of our extra `dev`, what running the tests takes

GLIBC_MINOR = 39  # of that machine's glibc 2.39; pip matches each manylinux_2_N exactly, so all are named
# bitsandbytes loads the newest library of torch's CUDA major version up to torch's own: this one serves 13.0 and later.
NATIVE = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")
SITE = ".gpu_site"
WHEEL = "Wheel-Version: 1.0\nGenerator: gpu_pack\nRoot-Is-Purelib: true\nTag: py3-none-any\n"  # of our metadata alone


class PackError(Exception):
    """The pack cannot be made; the text says why in one sentence."""


def pack(folder: Path, *, max_bytes: int = 64 * 2**20, python: str = "3.12") -> dict[str, Any]:
    """Fill `folder` with at most `max_bytes` of wheels; `python` is that machine's version, like "3.12".

    -> {"folder": path, "wheels": {file name: bytes}, "total_bytes": their sum}, which is JSON. Raises PackError.
    """
    if not re.fullmatch(r"3\.\d+", python):
        raise PackError(f'python: expected a version like "3.12", got "{python}"')
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PackError(f"{folder} is not an empty folder: name another one, or empty it")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        download(locked(PACKED, python=python), work, python=python)
        write_own_metadata(work)
        wheels = sorted(work.glob("*.whl"))
        strip_bitsandbytes(next(wheel for wheel in wheels if wheel.name.startswith("bitsandbytes-")))
        num_bytes = {wheel.name: wheel.stat().st_size for wheel in wheels}
        total_bytes = sum(num_bytes.values())
        if total_bytes > max_bytes:
            largest = max(num_bytes, key=lambda each: num_bytes[each])
            raise PackError(
                f"the pack is too large: it takes {_mib(total_bytes)} of {_mib(max_bytes)}; "
                f"its largest file is {largest}, {_mib(num_bytes[largest])}"
            )
        text = readme(folder, num_bytes, needed=needed_there(wheels, python=python), python=python)
        folder.mkdir(parents=True, exist_ok=True)
        for wheel in wheels:
            shutil.move(wheel, folder / wheel.name)
        (folder / "README.txt").write_text(text, encoding="utf-8")
    return {"folder": str(folder), "wheels": num_bytes, "total_bytes": total_bytes}


def locked(names: Iterable[str], *, python: str) -> list[str]:
    """-> lines for pip, `name==version --hash=...`: what the lock files pin for that machine.

    They carry no marker: pip would ask it of the Python that runs here.
    """
    place = _place(python)
    lines: dict[str, str] = {}
    for lock in LOCKS:
        for name, version, marker, hashes in ENTRY.findall((REPO / "tools" / lock).read_text(encoding="utf-8")):
            pinned = Requirement(f"{name}=={version} ; {marker}" if marker else f"{name}=={version}")
            if _holds(pinned, place):
                lines.setdefault(name, " ".join([f"{name}=={version}", *re.findall(r"--hash=\S+", hashes)]))
    missing = [name for name in names if name not in lines]
    if missing:
        raise PackError(f"tools/lock.txt pins no version for Python {python} of: {', '.join(missing)}")
    return [lines[name] for name in names]


def download(lines: list[str], folder: Path, *, python: str) -> None:
    """Fetch the wheel of every line for that machine's Python; pip refuses a file that has another hash."""
    wanted = folder / "wanted.txt"
    wanted.write_text("\n".join(lines) + "\n", encoding="utf-8")
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC_MINOR, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "any"]
    abis = (f"cp{python.replace('.', '')}", "abi3", "none")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--python-version", python]
    command += ["--implementation", "cp", *(part for abi in abis for part in ("--abi", abi))]
    command += [part for platform in platforms for part in ("--platform", platform)]
    command += ["--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        reason = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")][-1:] or said[-1:]
        raise PackError(f"pip download failed with exit code {done.returncode}: {reason[0]}")
    wanted.unlink()


def strip_bitsandbytes(wheel: Path) -> None:
    """Rewrite the wheel in place without the native libraries that are not in NATIVE, and their lines in RECORD."""
    stripped = wheel.with_suffix(".stripped")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(stripped, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        names = whole.namelist()
        dropped = {name for name in names if name.endswith(".so") and name.rpartition("/")[2] not in NATIVE}
        absent = [name for name in NATIVE if f"bitsandbytes/{name}" not in names]
        if absent:
            raise PackError(f"{wheel.name} has no {', '.join(absent)}: change NATIVE in tools/gpu/pack.py")
        for entry in whole.infolist():
            if entry.filename in dropped:
                continue
            content = whole.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                content = _without_rows(content, dropped)
            out.writestr(entry, content, zipfile.ZIP_DEFLATED, compresslevel=9)
    stripped.replace(wheel)


def write_own_metadata(folder: Path) -> None:
    """Write a wheel of `qlora-lite` that holds the metadata installed here, and no code."""
    try:
        text = metadata.distribution("qlora-lite").read_text("METADATA") or ""
    except metadata.PackageNotFoundError:
        raise PackError("qlora-lite is not installed in this environment: pip install -e .") from None
    name = f"qlora_lite-{metadata.version('qlora-lite')}"
    files = {
        f"{name}.dist-info/METADATA": text,
        f"{name}.dist-info/WHEEL": WHEEL,
    }
    record = f"{name}.dist-info/RECORD"
    rows = [f"{path},{_record_hash(content)},{len(content.encode('utf-8'))}" for path, content in files.items()]
    files[record] = "\n".join([*rows, f"{record},,", ""])
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as out:
        for path, content in files.items():
            out.writestr(path, content)


def needed_there(wheels: list[Path], *, python: str) -> dict[str, SpecifierSet]:
    """-> name -> versions: what this project and the packed wheels ask for and the pack does not hold.

    Raises PackError when the pack holds a version that one of them does not take.
    """
    place = _place(python)
    asked: list[tuple[str, Requirement]] = []
    held: dict[str, Version] = {}
    for wheel in wheels:
        name, held[name], _, _ = parse_wheel_filename(wheel.name)
        for requirement in _requirements(wheel):
            if _holds(requirement, place) or (name == "qlora-lite" and requirement.name in TESTED_WITH):
                asked.append((name, requirement))
    needed: dict[str, SpecifierSet] = {}
    for asker, requirement in asked:
        name = canonicalize_name(requirement.name)
        if name not in held:
            needed[name] = needed.get(name, SpecifierSet()) & requirement.specifier
        elif not requirement.specifier.contains(held[name], prereleases=True):
            raise PackError(f"{asker} asks for {requirement}, and the pack would hold {name} {held[name]}")
    return needed


def readme(folder: Path, num_bytes: dict[str, int], *, needed: dict[str, SpecifierSet], python: str) -> str:
    """The text of README.txt."""
    place = folder.resolve()
    path = shlex.quote(str(place.relative_to(REPO) if place.is_relative_to(REPO) else folder))
    return "\n".join(
        [
            f"What qlora_lite needs on a machine with a CUDA card and no network: {len(num_bytes)} wheels, "
            f"{_mib(sum(num_bytes.values()))}, for Python {python} on Linux, x86-64.",
            "bitsandbytes is stripped to its Python files, its library for CUDA 13 and the one for CPUs; "
            "qlora_lite is metadata alone (its code is the repository); the others are as published.",
            "",
            "Run there, in the repository's root:",
            "",
            f"    python3 -m pip install --no-index --no-deps --no-compile --upgrade --target {SITE} {path}/*.whl",
            f'    PYTHONPATH="$PWD/{SITE}:$PWD" tools/gpu_check --here',
            "",
            "That machine's own packages must be these:",
            "",
            *(f"    {name}{specifier}" for name, specifier in sorted(needed.items())),
            "",
            "Wheels, in bytes:",
            "",
            *(f"    {size:>12,}  {name}" for name, size in num_bytes.items()),
            "",
        ]
    )


def _place(python: str) -> dict[str, str]:
    """That machine, as requirements' markers ask for it."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "extra": "",
    }


def _holds(requirement: Requirement, place: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(place)


def _requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(each for each in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", each))
        message = HeaderParser().parsestr(archive.read(name).decode("utf-8"))
    return [Requirement(text) for text in message.get_all("Requires-Dist") or []]


def _record_hash(content: str) -> str:
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


def _without_rows(record: bytes, dropped: set[str]) -> bytes:
    """RECORD has one row a file: path, hash, bytes."""
    out = io.StringIO()
    rows = csv.reader(io.StringIO(record.decode("utf-8")))
    csv.writer(out, lineterminator="\n").writerows(row for row in rows if row and row[0] not in dropped)
    return out.getvalue().encode("utf-8")


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def main() -> int:
    """`python tools/gpu/pack.py DIR`: the last line of stdout is what `pack` returns, as JSON."""
    parser = argparse.ArgumentParser(description="Pack what a machine with a CUDA card and no network needs.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="an empty or new folder")
    parser.add_argument("--python", default="3.12", help="that machine's Python (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        print(json.dumps(pack(arguments.folder, python=arguments.python)))
    except PackError as error:
        print(f"gpu_pack: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
