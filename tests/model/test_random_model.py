"""A model without files is, in memory, the model that is loaded from files."""

import pytest

from qlora_lite.base.bnb import quantization_constants
from qlora_lite.base.quantization import Quantization
from qlora_lite.base.source import load_config
from qlora_lite.model.load import load_base
from qlora_lite.model.random_model import random_model
from tests.architectures import artefact, published


def memory(model) -> dict[str, tuple]:
    """Every parameter and buffer, by name, shape and type; the constants of quantized weights in order."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in named.items()}
    return found | {"constants": tuple((tuple(t.shape), t.dtype) for t in quantization_constants(model))}


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize("name", ["smollm2", "gemma2", "bloom", "falcon_old"])
def test_a_random_model_has_the_memory_of_a_loaded_one(name, method):
    folder = artefact(name) if method == "qlora" else published(name)
    quantization = Quantization("nf4") if method == "qlora" else None
    made = random_model(load_config(folder), quantization=quantization, device="cpu")
    assert memory(made) == memory(load_base(folder, device="cpu").model)
    assert not made.training and not any(parameter.requires_grad for parameter in made.parameters())
