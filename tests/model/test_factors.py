"""Factors copied from a folder are that folder's; what does not fit is named, and then nothing is copied."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite.errors import ModelError
from qlora_lite.files.library_names import FACTORS_FILE
from qlora_lite.model.adapter import Lora, attach_adapter, save_adapter
from qlora_lite.model.factors import copy_factors
from tests.tiny_model import gradients, random_rows, split_batches, tiny_adapted, tiny_base


def factors_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def saved(tmp_path):
    """-> (a model with moved factors, the folder it was saved in)."""
    model = tiny_adapted()
    save_adapter(model, tmp_path / "adapter", base_name="tiny")
    return model, tmp_path / "adapter"


def test_copied_factors_are_the_saved_ones_and_train_as_they_did(saved):
    model, folder = saved
    other = tiny_adapted(moved=False)
    copy_factors(other, folder)
    batches = split_batches(random_rows([3, 5]), 1)
    for left, right in ((factors_of(other), factors_of(model)), (gradients(other, batches), gradients(model, batches))):
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def test_fp32_factors_are_rounded_to_the_models_type(saved):
    _, folder = saved
    exact = {name: tensor.float() + 1e-5 for name, tensor in load_file(folder / FACTORS_FILE).items()}
    save_file(exact, folder / FACTORS_FILE)
    model = tiny_adapted(moved=False)
    copy_factors(model, folder)
    for name, factor in factors_of(model).items():
        assert torch.equal(factor, exact[name.replace(".default.", ".")].bfloat16()), name


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({"r": 8}, f"28 factors have another shape, first {FIRST} with 4x192 instead of 8x192"),
        ({"r": 4, "target_modules": ["q_proj"]}, f"24 factors have no place in the model, first {FIRST}"),
    ],
)
def test_factors_that_do_not_fit_are_counted_and_named_and_nothing_is_copied(adapter, expected, saved):
    model = attach_adapter(tiny_base().model, Lora(lora_alpha=8, **adapter))
    before = factors_of(model)
    with pytest.raises(ModelError, match=r"lora\.init_from: .*Set lora\.r and lora\.target_modules") as caught:
        copy_factors(model, saved[1])
    assert expected in str(caught.value)
    after = factors_of(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_folder_that_lacks_factors_is_refused(saved):
    model, folder = saved
    some = load_file(folder / FACTORS_FILE)
    save_file({name: tensor for name, tensor in some.items() if ".layers.0." in name}, folder / FACTORS_FILE)
    with pytest.raises(ModelError, match=r"14 factors are missing, first base_model\.model\.model\.layers\.1\."):
        copy_factors(model, folder)


def remove(file: Path) -> None:
    file.unlink()


def damage(file: Path) -> None:
    file.write_bytes(b"garbage")


@pytest.mark.parametrize("spoil", [remove, damage])
def test_a_missing_or_damaged_file_is_named(spoil, saved):
    model, folder = saved
    spoil(folder / FACTORS_FILE)
    with pytest.raises(ModelError, match=r"lora\.init_from: .*adapter_model\.safetensors cannot be read"):
        copy_factors(model, folder)
