"""transformers' own decoder, with the weights of a module in memory only while that module computes.

In: sequences of token ids, and a source of weight values. Out: last hidden states in fp32. An architecture's own code computes
everything between the weights (rotary or ALiBi positions, soft caps, multipliers, norms before or after), and the largest object in
memory is one weight. Of the embedding, only the rows of tokens that occur are read.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from qlora_lite.base.skeleton import empty_model, model_class
from qlora_lite.model.attention import PACKED, packs_rows, padded_attention

_ROW_TOKENS = 4096  # tokens per pass through the decoder; each pass reads all weights


class Weights(Protocol):
    """The source of the values, in fp32."""

    def row_blocks(self, name: str) -> Iterable[Tensor]:
        """The weight as blocks of whole rows [rows, width]."""

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Rows of an embedding."""


class StreamedDecoder:
    """The decoder of the model that `config` describes; it computes in fp32 on `device`."""

    def __init__(self, config: PreTrainedConfig, *, device: str) -> None:
        kind = model_class(config)
        attention = PACKED if packs_rows(kind) else padded_attention(kind)
        self.model = empty_model(config, dtype=torch.float32, attn_implementation=attention).eval()
        self.device = device
        names = {id(module): name for name, module in self.model.named_modules()}
        self.modules = {
            names[id(module)]: module
            for module in self.model.get_decoder().modules()
            if list(module.parameters(recurse=False))
        }
        self.weights = {f"{n}.{part}" for n, m in self.modules.items() for part, _ in m.named_parameters(recurse=False)}
        self.embedding = names[id(self.model.get_input_embeddings())]
        self.head = names[id(self.model.get_output_embeddings())]
        for module in self.model.get_decoder().modules():
            module._buffers.update({name: b.to(device) for name, b in module._buffers.items() if b is not None})

    def last_hidden_states(self, rows: Sequence[Sequence[int]], weights: Weights) -> list[Tensor]:
        """Last hidden states [T, D] of each sequence of token ids; sequences do not affect each other."""
        states: list[Tensor] = []
        with contextlib.ExitStack() as hooks, torch.no_grad():
            for name, module in self.modules.items():
                fill = self._fill_embedding if name == self.embedding else self._fill
                before = module.register_forward_pre_hook(
                    lambda module, args, name=name, fill=fill: fill(name, module, args, weights)
                )
                hooks.callback(before.remove)
                hooks.callback(module.register_forward_hook(_empty).remove)
            for group in _groups(rows):
                states += self._run(group)
        return states

    def _run(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        lengths = [len(row) for row in rows]
        decoder = self.model.get_decoder()
        if packs_rows(self.model):
            ids_1T = torch.tensor([[token for row in rows for token in row]], device=self.device)
            positions_1T = torch.tensor([[i for n in lengths for i in range(n)]], device=self.device)
            out = decoder(input_ids=ids_1T, position_ids=positions_1T, use_cache=False, lengths=tuple(lengths))
            return list(out.last_hidden_state[0].split(lengths))
        ids_BT = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
        for ids, row in zip(ids_BT, rows, strict=True):
            ids[: len(row)] = torch.tensor(row)
        mask_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        out = decoder(ids_BT.to(self.device), attention_mask=mask_BT.long().to(self.device), use_cache=False)
        return [states[:n] for states, n in zip(out.last_hidden_state, lengths, strict=True)]

    def _fill(self, name: str, module: nn.Module, args: Any, weights: Weights) -> None:
        for part, empty in module.named_parameters(recurse=False):
            values = torch.empty(empty.shape, device=self.device)
            flat, start = values.view(values.shape[0], -1), 0
            for block in weights.row_blocks(f"{name}.{part}"):
                flat[start : start + block.shape[0]] = block.to(self.device)
                start += block.shape[0]
            assert start == flat.shape[0], f"{name}.{part}: {start} rows of {flat.shape[0]}"
            module._parameters[part] = nn.Parameter(values, requires_grad=False)

    def _fill_embedding(self, name: str, module: nn.Module, args: Any, weights: Weights) -> tuple[Tensor]:
        """Load the rows of the tokens that occur, numbered from 0, and pass those numbers to the module."""
        tokens, places = _distinct(args[0], module.get_parameter("weight").shape[0])
        values = weights.rows(f"{name}.weight", tokens.cpu()).to(self.device)
        module._parameters["weight"] = nn.Parameter(values, requires_grad=False)
        return (places,)


def _distinct(ids: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """-> (the distinct tokens, the index of its token at each position); in a plan, the largest possible number of tokens."""
    if ids.is_meta:
        return torch.arange(min(ids.numel(), vocabulary)), torch.empty_like(ids)
    tokens, places = ids.unique(return_inverse=True)
    return tokens, places


def _empty(module: nn.Module, args: Any, output: Any) -> None:
    """Drop the values and keep the shapes, for the next pass."""
    for name, parameter in module.named_parameters(recurse=False):
        empty = torch.empty(1, dtype=parameter.dtype, device="meta").expand(parameter.shape)
        module._parameters[name] = nn.Parameter(empty, requires_grad=False)


def _groups(rows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Yield groups of neighbouring sequences with at most `_ROW_TOKENS` tokens after padding; a longer sequence alone."""
    group: list[Sequence[int]] = []
    for row in rows:
        if group and (len(group) + 1) * max(len(row), *map(len, group)) > _ROW_TOKENS:
            yield group
            group = []
        group.append(row)
    yield group
