"""The writer against the safetensors library, which reads what it wrote."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_lite.files.manifest import sha256_manifest, verify_manifest, write_manifest
from qlora_lite.files.safetensors_writer import ShardedWriter, TensorSpec


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "packed": torch.randint(0, 256, (7, 1), generator=generator, dtype=torch.uint8),  # 7 bytes: would misalign
        "bf16": torch.randn(6, 5, generator=generator).to(torch.bfloat16),
        "fp32": torch.randn(3, 3, generator=generator),
        "scalar": torch.tensor(4.0),
        "empty": torch.empty(0, 4),
        "int": torch.arange(5),
        "bool": torch.tensor([True, False, True]),
        "fp16": torch.randn(2, 3, generator=generator).half(),
    }
    return tensors


def write(folder: Path, tensors: dict[str, torch.Tensor], *, rows: int = 2, names=None, **options) -> None:
    folder.mkdir()
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with ShardedWriter(folder, specs, **options) as writer:
        for name in names or tensors:
            blocks = tensors[name].split(rows) if tensors[name].dim() else [tensors[name]]
            writer.write(name, blocks)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def test_safetensors_reads_back_what_was_written_in_blocks(tmp_path):
    write(tmp_path / "out", some_tensors())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert_equal(load_all(tmp_path / "out"), some_tensors())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_carry_an_index_that_names_every_tensor(tmp_path):
    tensors = some_tensors()
    write(tmp_path / "out", tensors, max_shard_bytes=64)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    for name, file_name in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file_name)[name], tensors[name])


def test_same_tensors_give_the_same_bytes_in_any_order_and_any_blocks(tmp_path):
    tensors = some_tensors()
    write(tmp_path / "a", tensors, rows=1)
    write(tmp_path / "b", tensors, rows=4, names=list(reversed(tensors)))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_files_are_readable_by_others_as_the_umask_allows(tmp_path):
    previous = os.umask(0o022)
    try:
        write(tmp_path / "out", some_tensors())
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("name", "blocks", "message"),
    [
        ("a", [torch.zeros(3)], "a: .2. is 8 bytes, got more than 12"),
        ("a", [torch.zeros(1)], "a: .2. is 8 bytes, got only 4"),
        ("a", [torch.zeros(2, dtype=torch.bfloat16)], "a: declared as torch.float32, got a block of torch.bfloat16"),
        ("b", [torch.zeros(2)], "b: not declared"),
    ],
)
def test_a_wrong_block_is_refused_by_name_and_leaves_no_file(tmp_path, name, blocks, message):
    with (
        pytest.raises(ValueError, match=message),
        ShardedWriter(tmp_path, {"a": TensorSpec((2,), torch.float32)}) as writer,
    ):
        writer.write(name, blocks)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_never_came_is_named_and_no_file_is_left(tmp_path):
    specs = {"a": TensorSpec((2,), torch.float32), "b": TensorSpec((2,), torch.float32)}
    with pytest.raises(ValueError, match="1 declared tensors were never written, first b"):
        with ShardedWriter(tmp_path, specs) as writer:
            writer.write("a", [torch.zeros(2)])
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_notices_a_flipped_byte_a_missing_and_a_cut_file(tmp_path):
    write(tmp_path / "out", some_tensors(), max_shard_bytes=64)
    folder = tmp_path / "out"
    manifest = write_manifest(folder, {"base": {"name": "tiny"}})
    assert manifest["files"] == sha256_manifest(folder)
    assert {**json.loads((folder / "manifest.json").read_text()), "sha256": None} == {**manifest, "sha256": None}
    assert verify_manifest(folder) == []
    first, second, third = sorted(folder.glob("*.safetensors"))[:3]
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    second.unlink()
    third.write_bytes(third.read_bytes()[:-1])
    problems = verify_manifest(folder)
    assert [line.split(": ")[0] for line in problems] == [str(first), str(second), str(third)]
    assert "contents changed" in problems[0] and "missing" in problems[1] and "bytes" in problems[2]
    (folder / "manifest.json").unlink()
    assert (
        "cannot" not in verify_manifest(folder)[0]
        and "no file in this folder can be checked" in verify_manifest(folder)[0]
    )
