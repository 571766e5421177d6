"""A loaded base: frozen, in eval mode, and in the number type that was asked for throughout."""

import pytest
import torch

from qlora_lite.errors import ModelError
from qlora_lite.model.attention import PACKED
from qlora_lite.model.forward import causal_lm, predicting_states
from qlora_lite.model.load import checkpoint_activations, load_base, load_tokenizer
from qlora_lite.training.step import batch_loss
from tests.data.tiny_tokenizer import make_tokenizer
from tests.tiny_model import (
    gradients,
    linear4bit_layers,
    random_rows,
    split_batches,
    tiny_adapted,
    tiny_artefact,
    tiny_base,
    tiny_source,
)


def states_of(model, batch):
    return predicting_states(
        model,
        input_ids_1T=batch.input_ids_1T,
        position_ids_1T=batch.position_ids_1T,
        lengths=batch.lengths,
        parents=batch.parents,
        predictor_N=batch.predictor_N,
    )


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32])
def test_everything_between_the_4_bit_weights_is_computed_in_the_type_asked_for(compute):
    base = tiny_base(compute=compute)
    floating = {parameter.dtype for parameter in base.model.parameters() if parameter.is_floating_point()}
    assert floating == {compute}
    assert {layer.compute_dtype for layer in linear4bit_layers(base.model).values()} == {compute}
    (batch,) = split_batches(random_rows([3, 4]), 1)
    hidden_ND = states_of(base.model, batch)
    assert hidden_ND.shape == (7, 64) and hidden_ND.dtype == compute
    assert base.model.get_output_embeddings()(hidden_ND).dtype == compute
    tensors = {id(tensor): tensor for tensor in [*base.model.parameters(), *base.model.buffers()]}
    assert base.weights_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_a_base_is_frozen_in_eval_mode_and_packed():
    model = tiny_base().model
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == PACKED


def test_its_tokenizer_is_the_sources():
    tokenizer, expected = tiny_base().tokenizer, make_tokenizer()
    text = "Context: Paris is the capital of France."
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert tokenizer.chat_template == expected.chat_template and tokenizer.eos_token == expected.eos_token


def test_loading_prints_nothing(capfd):
    tiny_artefact()
    capfd.readouterr()
    tiny_base()
    assert capfd.readouterr() == ("", "")


def test_recomputing_activations_does_not_change_loss_or_gradient():
    model = tiny_adapted()
    batches = split_batches(random_rows([3, 9]), 1)
    model.train()
    loss, kept = batch_loss(model, batches[0]).item(), gradients(model, batches)
    checkpoint_activations(causal_lm(model), every=1)
    assert causal_lm(model).is_gradient_checkpointing
    assert batch_loss(model, batches[0]).item() == loss
    again = gradients(model, batches)
    assert all(torch.equal(again[name], gradient) for name, gradient in kept.items())
    checkpoint_activations(causal_lm(model), every=0)
    assert not causal_lm(model).is_gradient_checkpointing


def test_recomputing_keeps_fewer_activations():
    (batch,) = split_batches(random_rows([3, 9]), 1)

    def saved_bytes(enable):
        model = tiny_adapted().train()
        checkpoint_activations(causal_lm(model), every=int(enable))
        seen = {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            batch_loss(model, batch)
        return sum(seen.values())

    assert saved_bytes(True) < saved_bytes(False) / 3


def test_a_merged_checkpoint_loads_as_an_ordinary_model():
    loaded = load_base(tiny_source(), device="cpu")
    assert not linear4bit_layers(loaded.model) and loaded.quant_constants_bytes == 0
    assert loaded.weights_bytes > tiny_base().weights_bytes
    (batch,) = split_batches(random_rows([3, 4]), 1)
    assert states_of(loaded.model, batch).dtype == torch.bfloat16


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_base(tmp_path, device="cpu")
    with pytest.raises(ModelError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)
