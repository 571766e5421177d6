"""Special tokens that are new to a model: ids in the tokenizer, rows in embedding and head, and training of these rows only.

Many models have more rows than their tokenizer has tokens (for example, padded to a multiple of 64): new ids use these first, and only
missing rows are added. An added row starts as the mean of all rows, a neutral value.

peft trains and stores single rows (`trainable_token_indices`), but its layer copies the whole embedding in every forward pass: 1 GiB at
128k x 4,096, and again for each chunk of the loss. `NewTokenRows` keeps peft's parameters and file format, and copies no old rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from transformers import AddedToken, PreTrainedModel

from qlora_lite.errors import ModelError


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Make each of `tokens` a special token of `tokenizer`; return their ids in order. Raises ModelError when one is split."""
    known = tokenizer.get_vocab()
    new = [AddedToken(token, special=True, normalized=False) for token in tokens if token not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    for token, token_id in zip(tokens, ids, strict=True):
        if tokenizer(token, add_special_tokens=False)["input_ids"] != [token_id]:
            raise ModelError(f"data.special_tokens: this tokenizer does not keep {token!r} in one piece. Leave it out")
    return ids


def make_room(model: PreTrainedModel, token_ids: Sequence[int]) -> list[int]:
    """Give embedding and head a frozen row for each of `token_ids`; return the ids whose rows are to be trained.

    These include ids below `token_ids` that also got a row, when the tokenizer had more tokens than the base has rows: rows have no gaps,
    so the adapter's file must hold them too.
    """
    num_rows, num_tokens = model.get_input_embeddings().weight.shape[0], max(token_ids, default=-1) + 1
    trained = sorted({*token_ids, *range(num_rows, num_tokens)})
    if num_tokens <= num_rows:
        return trained
    layers = {id(layer.weight): layer for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    first = {key: layer.weight.float().mean(0) for key, layer in layers.items()}
    is_tied = len(layers) == 1
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    for row, layer in zip(first.values(), (model.get_input_embeddings(), model.get_output_embeddings()), strict=False):
        layer.weight.data[num_rows:] = row.to(layer.weight.dtype)
    assert not is_tied or model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.requires_grad_(False)
    return trained


def token_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules with one row per token: the embedding, and an untied head."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [names[id(embedding)], *([] if head.weight is embedding.weight else [names[id(head)]])]


def set_up_new_tokens(adapted: PeftModel) -> None:
    """Replace peft's layers for single rows by ours, with fp32 gradients; no effect without new tokens."""
    for module in list(adapted.modules()):
        if isinstance(module, TrainableTokensWrapper):
            module.token_adapter = NewTokenRows(module.token_adapter)


class NewTokenRows(TrainableTokensLayer):
    """peft's layer with the same parameters and names, and a forward pass without the large copy."""

    def __init__(self, layer: TrainableTokensLayer) -> None:
        super().__init__(layer.base_layer, "default", tied_adapter=layer.tied_adapter)
        self.trainable_tokens_delta = layer.trainable_tokens_delta
        self.trainable_tokens_original = layer.trainable_tokens_original
        self.token_indices = layer.token_indices
        rows = self.trainable_tokens_delta["default"]
        if rows.requires_grad:
            rows.grad_dtype = torch.float32

    def forward_adapters(
        self, x: torch.Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Token ids [B, T] -> [B, T, D] for an embedding; hidden states [..., D] -> logits [..., V] for a head."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or not active_adapters:
            return result
        rows_ND = _Widened.apply(self.trainable_tokens_delta["default"])
        ids_N = torch.tensor(self.token_indices["default"], device=x.device)
        if isinstance(self.base_layer, torch.nn.Embedding):
            is_new_BTN = x[..., None] == ids_N
            scale = self._get_embed_scale()  # Gemma multiplies its embeddings
            new_BTD = torch.nn.functional.embedding(is_new_BTN.int().argmax(-1), rows_ND)
            new_BTD = new_BTD if scale is None else new_BTD * scale.to(new_BTD.dtype)
            return torch.where(is_new_BTN.any(-1)[..., None], new_BTD.to(result.dtype), result)
        return result.index_copy(-1, ids_N, torch.nn.functional.linear(x.float(), rows_ND).to(result.dtype))


class _Widened(torch.autograd.Function):
    """The rows in fp32; their gradient stays fp32, not rounded to their own type."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.float()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad
