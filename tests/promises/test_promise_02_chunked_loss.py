"""Promise 2: the chunked loss equals the full-logits loss, value and gradient, and a full logits tensor never exists."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_lite.data.batches import pack_trees
from qlora_lite.model.forward import causal_lm
from qlora_lite.model.head import CHUNK, summed_loss
from qlora_lite.training.step import batch_loss
from tests.random_tree import random_tree
from tests.tiny_model import SIZES, random_rows, relative_difference, split_batches, take_gradients, tiny_adapted

VOCAB, WIDTH = 300, 32


def model_with_head(vocab: int = VOCAB, *, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    head = torch.nn.Linear(WIDTH, vocab, bias=False, dtype=dtype).requires_grad_(False)
    return SimpleNamespace(get_output_embeddings=lambda: head, config=SimpleNamespace())


def full_loss(model, hidden_ND, target_N):
    logits_NV = model.get_output_embeddings()(hidden_ND).float()
    return torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="sum")


class LargestStorage(TorchDispatchMode):
    """Bytes of the largest storage that any operation gave back."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("num_labels", [1, 15, 16, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_equals_full_logits_loss_in_value_and_gradient(num_labels, dtype):
    model = model_with_head(dtype=dtype)
    target_N = torch.randint(0, VOCAB, (num_labels,))
    chunked_ND = torch.randn(num_labels, WIDTH, dtype=dtype).requires_grad_()
    full_ND = chunked_ND.detach().clone().requires_grad_()
    chunked, full = summed_loss(model, chunked_ND, target_N), full_loss(model, full_ND, target_N)
    chunked.backward()
    full.backward()
    assert chunked.dtype == torch.float32 and chunked.shape == ()
    torch.testing.assert_close(chunked, full, rtol=1e-6, atol=0)
    limit = 1e-5 if dtype == torch.float32 else 2**-8  # one rounding of bf16
    assert (chunked_ND.grad - full_ND.grad).float().norm() <= limit * full_ND.grad.float().norm()
    assert chunked_ND.grad.dtype == dtype


def test_no_tensor_is_larger_than_one_chunk_of_logits():
    vocab, num_labels = 2048, 4 * CHUNK
    model, target_N = model_with_head(vocab), torch.randint(0, vocab, (num_labels,))
    with LargestStorage() as largest:
        summed_loss(model, torch.randn(num_labels, WIDTH).requires_grad_(), target_N).backward()
    assert largest.num_bytes == 4 * CHUNK * vocab
    with LargestStorage() as largest:  # the watch sees the tensor where it exists
        full_loss(model, torch.randn(num_labels, WIDTH).requires_grad_(), target_N).backward()
    assert largest.num_bytes == 4 * num_labels * vocab


def test_a_training_step_never_holds_logits_of_all_its_tokens():
    model = tiny_adapted()
    vocab = model.get_base_model().config.vocab_size
    assert vocab > SIZES["intermediate_size"]  # else an fp32 gradient in the MLP would be as large
    (batch,) = split_batches(random_rows([3] * 8, prompt=(60, 60)), 1)
    num_tokens = batch.input_ids_1T.shape[1]
    with LargestStorage() as largest:
        batch_loss(model, batch).backward()
    assert largest.num_bytes < 4 * num_tokens * vocab  # the loss is computed in fp32


@pytest.mark.parametrize("head_chunk", [16, 64])
def test_a_tree_has_the_loss_of_its_examples_full_logits(head_chunk):
    rows = random_tree(random.Random(0), depth=3, fan=4)
    model = tiny_adapted(compute=torch.float32, factors=torch.float32)
    tree = pack_trees(rows, range(len(rows)))
    assert len(tree.target_N) > head_chunk and max(tree.parents) > 0
    base, full = causal_lm(model), torch.zeros(())
    for batch in split_batches(rows, len(rows)):
        logits_TV = base(input_ids=batch.input_ids_1T, use_cache=False, lengths=batch.lengths).logits[0].float()
        full = full + torch.nn.functional.cross_entropy(logits_TV[batch.predictor_N], batch.target_N, reduction="sum")
    full.backward()
    expected = take_gradients(model)
    chunked = batch_loss(model, tree, head_chunk=head_chunk)
    chunked.backward()
    torch.testing.assert_close(chunked, full, rtol=1e-5, atol=0)
    assert relative_difference(take_gradients(model), expected) < 1e-5
