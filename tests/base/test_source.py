"""From a base's name to a folder: every way it can be wrong is one clear sentence."""

import json
import shutil
from pathlib import Path

import pytest

from qlora_lite.base.source import find_base, folder_fingerprint
from qlora_lite.errors import ModelError
from tests.tiny_model import tiny_source


def test_a_folder_is_found_as_it_is(tmp_path):
    assert find_base(str(tiny_source()), cache=tmp_path) == tiny_source()


@pytest.mark.parametrize("name", ["/no/such/folder", "no/such/model", "nothing.gguf"])
def test_a_base_that_is_not_there_is_refused_with_what_a_base_can_be(tmp_path, name):
    with pytest.raises(ModelError, match=rf"{name}: no such folder, \.gguf file or shipped name \(smollm2-135m\)"):
        find_base(name, cache=tmp_path)


def test_a_shipped_model_that_was_not_brought_names_the_command_that_brings_it(tmp_path):
    with pytest.raises(ModelError, match=r"not in the cache.*qlora-lite fetch smollm2-135m"):
        find_base("smollm2-135m", cache=tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"not a model folder: config\.json is missing"):
        find_base(str(tmp_path), cache=tmp_path)


def test_a_kind_of_model_that_is_not_supported_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="model_type 'bert' is not supported; supported: llama"):
        find_base(str(tmp_path), cache=tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "a mixture of experts"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "a mixture of experts"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "a mixture of experts"),
        ({"model_type": "llava", "vision_config": {}, "text_config": {}}, "images or sound"),
        ({"model_type": "qwen2_5_vl", "vision_config": {}}, "images or sound"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder-decoder"),
        ({"model_type": "mamba", "state_size": 16}, "a state-space or recurrent model"),
        ({"model_type": "recurrent_gemma"}, "a state-space or recurrent model"),
    ],
)
def test_kinds_that_are_not_tuned_here_are_refused_with_the_reason(tmp_path, config, reason):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"model_type '{config['model_type']}' is not supported: .*{reason}"):
        find_base(str(tmp_path), cache=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("{}", "model_type None is not supported"),
        ("[" * 100_000, "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
    ids=["cut", "list", "empty", "deep", "bytes"],
)
def test_a_damaged_config_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match=message):
        find_base(str(tmp_path), cache=tmp_path)


def test_a_file_that_is_no_gguf_by_name_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"a base is a folder with config\.json and safetensors, or a \.gguf file"):
        find_base(str(file), cache=tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"not a gguf file at all", b"GGUF\x03\0\0\0" + b"\xff" * 64, b"GGUF\x03\0\0\0" + b"\0" * 16],
    ids=["empty", "magic", "text", "garbage", "no fields"],
)
def test_a_gguf_that_is_none_is_refused_and_leaves_nothing_behind(tmp_path, content):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.gguf: not a readable GGUF file"):
        find_base(str(file), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "converted").iterdir())


def test_the_fingerprint_changes_with_any_file_of_the_folder(tmp_path):
    folder = Path(shutil.copytree(tiny_source(), tmp_path / "source"))
    first = folder_fingerprint(folder)
    assert folder_fingerprint(folder) == first
    (folder / "tokenizer_config.json").write_text("{}")
    second = folder_fingerprint(folder)
    (folder / "new").write_text("")
    assert len({first, second, folder_fingerprint(folder)}) == 3
