"""A padding token changes nothing: wherever config.json puts it, a base loads, trains, plans and merges with proof as without one."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Olmo2Config, Olmo2ForCausalLM, Phi3Config, Phi3ForCausalLM

from qlora_lite.base.source import load_config, read_config
from qlora_lite.device.card import CPU
from qlora_lite.merging import merge
from qlora_lite.model.adapter import Lora, attach_adapter, save_adapter
from qlora_lite.model.load import load_base
from qlora_lite.model.new_tokens import make_room
from qlora_lite.model.trained import make_trainable, save_trained
from qlora_lite.plan import MicroBatch, Settings, Stage
from qlora_lite.plan.merging import Merging, proof_peak_host_bytes
from tests.data.tiny_tokenizer import make_tokenizer
from tests.tiny_model import SIZES, gradients, move_factors, random_rows, save_tiny_llama, split_batches

ROWS, VOCABULARY = random_rows([3, 6, 2, 5]), 330
SETTINGS = Settings(card=CPU, r=4, optimizer="adamw")


def with_pad(folder: Path, pad: int | None) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": pad}))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("padding") / "base", vocab_size=VOCABULARY)


def adapter_gradients(base: Path) -> dict[str, torch.Tensor]:
    model = attach_adapter(
        load_base(base, device="cpu").model, Lora(r=4, lora_alpha=8, modules_to_save=["embed_tokens"])
    )
    move_factors(model)
    return gradients(model, split_batches(ROWS, 2))


def full_gradients(base: Path) -> dict[str, torch.Tensor]:
    model = load_base(base, device="cpu").model
    make_trainable(model)
    return gradients(model, split_batches(ROWS, 2))


def test_a_padding_token_changes_no_gradient(llama):
    for of_method in (adapter_gradients, full_gradients):
        without = of_method(with_pad(llama, None))
        for pad in (2, -1, VOCABULARY):
            found = of_method(with_pad(llama, pad))
            assert found.keys() == without.keys() and all(torch.equal(found[name], without[name]) for name in found)


def test_the_row_of_a_padding_token_that_occurs_is_trained(llama):
    """`eos` is often the padding token too; torch would leave its row as it is."""
    token = ROWS.encoded(0).input_ids[0]
    found = full_gradients(with_pad(llama, token))
    assert found["model.embed_tokens.weight"][token].any()


def proved(base: Path, folder: Path) -> float:
    model = attach_adapter(load_base(base, device="cpu").model, Lora(r=4, lora_alpha=8))
    move_factors(model)
    save_adapter(model, folder / "adapter", base_name="base")
    result = merge(base, folder / "adapter", folder / "merged", [ROWS.encoded(0)])
    AutoModelForCausalLM.from_pretrained(folder / "merged", local_files_only=True)  # plain transformers reads it
    return result.arithmetic_ratio


def plan(base: Path) -> tuple[int, int]:
    config = load_config(base)
    return (
        Stage(config, SETTINGS).rehearse_shallow(MicroBatch(32, 2)).peak_bytes,
        proof_peak_host_bytes(config, Merging(SETTINGS), [(20, 5)]),
    )


def test_a_base_with_any_padding_token_is_planned_as_without_one(llama):
    expected = plan(with_pad(llama, None))
    assert all(plan(with_pad(llama, pad)) == expected for pad in (VOCABULARY - 1, -1, 32000))


@pytest.mark.parametrize("pad", [VOCABULARY - 1, -1, 32000])
def test_a_base_with_any_padding_token_is_merged_with_proof(llama, tmp_path, pad):
    base = with_pad(llama, pad)
    assert proved(base, tmp_path) < 0.01
    written = json.loads((tmp_path / "merged" / "config.json").read_text())["pad_token_id"]
    assert written == (None if pad == 32000 else pad)


@pytest.mark.parametrize("pad", [None, 0, VOCABULARY - 1, -1, -VOCABULARY, VOCABULARY, 32000, -VOCABULARY - 1])
def test_only_a_padding_token_without_a_row_is_read_as_none(llama, pad):
    has_row = pad is not None and -VOCABULARY <= pad < VOCABULARY
    for config in (read_config(with_pad(llama, pad)), load_config(llama).to_dict()):
        assert config["pad_token_id"] == (pad if has_row else None)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (Phi3Config(**SIZES, vocab_size=400, pad_token_id=390, original_max_position_embeddings=512), Phi3ForCausalLM),
        (Olmo2Config(**SIZES, vocab_size=400, pad_token_id=399), Olmo2ForCausalLM),
    ],
)
def test_bases_whose_padding_token_lies_behind_the_rows_of_a_proof_merge(config, kind, tmp_path):
    kind(config).bfloat16().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    assert proved(tmp_path / "base", tmp_path) < 0.01


def test_a_phi_3_config_that_names_no_padding_token_is_not_refused_for_the_default_one(tmp_path):
    config = Phi3Config(**SIZES, vocab_size=400, pad_token_id=1, original_max_position_embeddings=512)
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["pad_token_id"]
    path.write_text(json.dumps(values))
    assert load_config(tmp_path).pad_token_id is None
    assert all(plan(tmp_path))


def test_new_tokens_find_room_beside_a_padding_token_in_the_last_row(llama):
    model = load_base(with_pad(llama, VOCABULARY - 1), device="cpu").model
    new = [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]
    assert make_room(model, new) == new
    assert model.get_input_embeddings().padding_idx is None
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY + 3


def test_all_weights_are_written_so_that_transformers_reads_them_beside_a_padding_token_without_a_row(llama, tmp_path):
    base = with_pad(llama, VOCABULARY)
    assert read_config(base)["pad_token_id"] is None
    model = load_base(base, device="cpu").model
    make_trainable(model)
    save_trained(model, tmp_path, base=base)
    AutoModelForCausalLM.from_pretrained(tmp_path / "weights", local_files_only=True)
