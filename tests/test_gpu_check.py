"""The tool that checks a card: what it does without one, what it packs, and its items on the stand-in."""

import csv
import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path
from types import ModuleType

import pytest

from tests import standin
from tests.conftest import REPOSITORY

TOOL = REPOSITORY / "tools" / "gpu_check"


def run_tool(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *words], capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def packing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pack", REPOSITORY / "tools" / "gpu" / "pack.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_card_it_says_so_and_exits_with_2():
    import torch

    if torch.cuda.is_available():
        pytest.skip("a card is here")
    done = run_tool("--here")
    assert done.returncode == 2 and "no CUDA card that torch can use" in done.stderr and not done.stdout


@pytest.mark.slow
def test_its_items_hold_on_the_stand_in_and_each_prints_a_line_at_once(tmp_path: Path):
    if standin.why_not() is not None:
        pytest.skip(standin.why_not())
    done = run_tool("--stand-in", "--out", str(tmp_path / "found.json"))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    *items, document = lines
    assert [item["item"] for item in items] == [2, 3, 4, 6] and all(item["ok"] for item in items)
    assert document["items"] == items and document["num_failed"] == 0
    assert json.loads((tmp_path / "found.json").read_text()) == document


def test_an_item_that_fails_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    from gpu import items

    def wrong() -> dict:
        raise AssertionError("not as planned")

    found = [items.run(items.Item(n, "try", work)) for n, work in ((1, wrong), (2, lambda: {"x": 1}))]
    assert [each["ok"] for each in found] == [False, True]
    assert "AssertionError: not as planned" in found[0]["error"] and "wrong" in found[0]["where"]
    assert found[1]["found"] == {"x": 1}


def test_the_lock_has_a_version_and_hashes_of_all_that_is_packed(packing: ModuleType):
    lines = packing.locked(packing.PACKED, python="3.12")
    assert len(lines) == len(set(packing.PACKED)) and all("==" in line and "--hash=sha256:" in line for line in lines)
    with pytest.raises(packing.PackError, match=r"pins no version for Python 3\.12 of: abacus"):
        packing.locked(["abacus"], python="3.12")


def test_bitsandbytes_keeps_its_python_and_the_libraries_of_one_cuda(packing: ModuleType, tmp_path: Path):
    wheel = tmp_path / "bitsandbytes-0.0.1-py3-none-any.whl"
    files = {
        "bitsandbytes/__init__.py": b"x = 1\n",
        "bitsandbytes/libbitsandbytes_cpu.so": b"cpu",
        "bitsandbytes/libbitsandbytes_cuda130.so": b"cuda",
        "bitsandbytes/libbitsandbytes_cuda118.so": b"old" * 1000,
        "bitsandbytes-0.0.1.dist-info/METADATA": b"Name: bitsandbytes\n",
        "bitsandbytes-0.0.1.dist-info/WHEEL": b"Wheel-Version: 1.0\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, "bitsandbytes-0.0.1.dist-info/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in (files | {"bitsandbytes-0.0.1.dist-info/RECORD": record.encode()}).items():
            archive.writestr(name, content)
    packing.strip_bitsandbytes(wheel)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert names == files.keys() - {"bitsandbytes/libbitsandbytes_cuda118.so"} | {
            "bitsandbytes-0.0.1.dist-info/RECORD"
        }
        rows = list(csv.reader(io.StringIO(archive.read("bitsandbytes-0.0.1.dist-info/RECORD").decode())))
        for name, digest, size in rows:
            if digest:
                content = archive.read(name)
                expected = urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                assert (digest, int(size)) == (f"sha256={expected}", len(content))
        assert {name for name, *_ in rows} == names


def test_a_pack_that_is_too_large_is_refused_and_leaves_nothing(
    packing: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def download(lines: list[str], folder: Path, *, python: str) -> None:
        (folder / "bitsandbytes-0.0.1-py3-none-any.whl").write_bytes(b"0" * 5000)

    monkeypatch.setattr(packing, "download", download)
    monkeypatch.setattr(packing, "strip_bitsandbytes", lambda wheel: None)
    with pytest.raises(packing.PackError, match="too large"):
        packing.pack(tmp_path / "pack", max_bytes=1000)
    assert not (tmp_path / "pack").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    with pytest.raises(packing.PackError, match="not an empty folder"):
        packing.pack(tmp_path / "full")
