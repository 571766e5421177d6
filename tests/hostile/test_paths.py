"""Names of files that a file gives: those of its folder, and no others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file

from qlora_lite.base.companions import copy_companions
from qlora_lite.base.published import open_tensors
from qlora_lite.base.tensor_files import weight_files
from qlora_lite.data.read import read_mix
from qlora_lite.errors import ModelError, UserError
from qlora_lite.files.names import inside
from qlora_lite.merging.checkpoint import Checkpoint
from tests.tiny_model import tiny_source

OUTSIDE = (
    *("..", ".", "", " ", "a/..", "../a", "a/../../b", "/a", "//a", "~/a", "C:\\a", "c:/a", "a\\b", "\\\\host\\a", "a//b", "./a", "a/"),
    *("a\0b", "a\nb", " a", "a ", "\ud800", None, 3, True, ["a"], {"a": 1}),
)  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_a_name_that_leaves_its_folder_is_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(UserError, match=r"index\.json: names the file .*File names must stay in"):
        inside(tmp_path, name, named_by="index.json")


@pytest.mark.parametrize("name", ["a", "model-00001-of-00002.safetensors", "a/b", "..a", "a..b", ".hidden", "é 💥.bin"])
def test_a_name_below_the_folder_is_its_path(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name, named_by="x") == tmp_path / name


def test_a_link_is_followed_only_inside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "below").mkdir(parents=True)
    (folder / "a").write_text("a")
    (tmp_path / "secret").write_text("s")
    (folder / "near").symlink_to("a")
    (folder / "far").symlink_to(tmp_path / "secret")
    (folder / "below" / "up").symlink_to("../../secret")
    (folder / "loop").symlink_to("loop")
    (folder / "away").symlink_to(tmp_path, target_is_directory=True)
    assert inside(folder, "near", named_by="x").read_text() == "a"
    for name in ("far", "below/up", "away/secret"):
        with pytest.raises(UserError, match="which is a link out of the folder"):
            inside(folder, name, named_by="x")
    (tmp_path / "linked").symlink_to(folder)
    assert inside(tmp_path / "linked", "a", named_by="x").read_text() == "a"  # the folder itself may be a link


def test_the_hubs_own_cache_keeps_its_links_to_its_blobs_and_no_others(tmp_path: Path) -> None:
    root = tmp_path / "models--org--name"
    (root / "blobs").mkdir(parents=True)
    (root / "snapshots" / "commit").mkdir(parents=True)
    (root / "blobs" / "123").write_text("weights")
    (root / "other").write_text("x")
    folder = root / "snapshots" / "commit"
    (folder / "model.safetensors").symlink_to("../../blobs/123")
    (folder / "x.safetensors").symlink_to("../../other")
    assert inside(folder, "model.safetensors", named_by="x").read_text() == "weights"
    with pytest.raises(UserError, match="a link out of the folder"):
        inside(folder, "x.safetensors", named_by="x")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "link.safetensors", "below/../../secret.safetensors", "ABSOLUTE", "x.bin", 3]
)
def test_an_index_names_no_file_outside_of_its_folder(tmp_path: Path, name: Any) -> None:
    folder = Path(shutil.copytree(tiny_source(), tmp_path / "model"))
    save_file({"secret": torch.ones(1)}, tmp_path / "secret.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    name = str(tmp_path / "secret.safetensors") if name == "ABSOLUTE" else name
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": name}}), encoding="utf-8")
    for read in (weight_files, lambda path: list(open_tensors(path)), Checkpoint):
        with pytest.raises(ModelError, match=r"index\.json: no usable weight_map"):
            read(folder)


def test_weights_that_are_a_link_out_of_their_folder_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_source(), tmp_path / "model"))
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ModelError, match=r"names the file 'model\.safetensors', which is a link out"):
        list(open_tensors(folder))


@pytest.mark.parametrize("name", ["tokenizer.secret", "additional_chat_templates/x.jinja"])
def test_what_a_link_leads_to_is_not_published_with_a_merged_model(tmp_path: Path, name: str) -> None:
    (tmp_path / "key").write_text("secret")
    source, out = tmp_path / "source", tmp_path / "out"
    (source / name).parent.mkdir(parents=True)
    out.mkdir()
    (source / name).symlink_to(tmp_path / "key")
    with pytest.raises(UserError, match="a link out of the folder"):
        copy_companions(source, out)
    assert not (out / name).exists()


@pytest.mark.parametrize("name", ["../other/data-00000-of-00001.arrow", "ABSOLUTE", "link.arrow"])
def test_a_saved_data_set_names_no_file_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    for folder in ("mine", "other"):
        Dataset.from_list([{"text": folder}]).save_to_disk(tmp_path / folder)
    data = tmp_path / "other" / "data-00000-of-00001.arrow"
    (tmp_path / "mine" / "link.arrow").symlink_to(data)
    state = tmp_path / "mine" / "state.json"
    document = json.loads(state.read_text(encoding="utf-8"))
    assert read_mix(tmp_path / "mine").num_rows == 1
    document["_data_files"] = [{"filename": str(data) if name == "ABSOLUTE" else name}]
    state.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(UserError, match=r"state\.json: names the file"):
        read_mix(tmp_path / "mine")
