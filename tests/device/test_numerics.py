"""How libraries compute on a card: set while our code computes, and only then."""

import pytest
import torch

from qlora_lite.device.numerics import exact_sums
from qlora_lite.evaluation.generate import generate_batch, generating, greedy
from qlora_lite.evaluation.scores import validation_loss
from qlora_lite.merging.proof import full_fp32
from qlora_lite.model.forward import causal_lm
from tests.tiny_model import gradients, random_rows, split_batches, tiny_adapted

DEFAULT, OURS = (True, True, True), (False, False, False)


def settings() -> tuple[bool, bool, bool]:
    products = torch.backends.cuda.matmul
    return (
        products.allow_bf16_reduced_precision_reduction,
        products.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


@pytest.fixture(autouse=True)
def as_torch_has_them():
    assert settings() == DEFAULT
    yield
    assert settings() == DEFAULT


def test_sums_are_exact_inside_and_as_before_outside_also_after_an_error():
    with pytest.raises(ZeroDivisionError), exact_sums():
        assert settings() == OURS
        raise ZeroDivisionError


def test_what_the_user_has_set_comes_back():
    torch.backends.cuda.enable_cudnn_sdp(False)
    with exact_sums():
        pass
    assert settings() == (True, True, False)
    torch.backends.cuda.enable_cudnn_sdp(True)


def seen_in(model: torch.nn.Module) -> tuple[set, list]:
    """What a layer finds set, in its forward and its backward pass."""
    seen: set[tuple[str, tuple[bool, bool, bool]]] = set()
    layer = causal_lm(model).get_decoder().layers[0]

    def forward(module, inputs, output) -> None:
        seen.add(("forward", settings()))
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: seen.add(("backward", settings())))

    return seen, [layer.register_forward_hook(forward)]


def test_training_validation_answers_and_the_proof_compute_so():
    model, rows = tiny_adapted(), random_rows([3, 5])
    seen, _ = seen_in(model)
    gradients(model, split_batches(rows, 1))
    assert seen == {("forward", OURS), ("backward", OURS)}
    seen.clear()
    validation_loss(model, rows, device="cpu", micro_batch_tokens=100)
    with generating(model):
        ids = torch.ones(1, 4, dtype=torch.int64)
        generate_batch(model, ids, torch.ones_like(ids), config=greedy(stop_token=1, max_new_tokens=2))
    assert seen == {("forward", OURS)}
    with full_fp32():
        assert settings() == OURS
