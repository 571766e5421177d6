"""Greedy answers in batches of similar length, with a key/value cache, up to the token that ends rows in training.

If prompts share a prefix (a passage with several questions), a batch is read as a packed prefix tree, each shared part once, and its
keys and values are copied to the prompts that continue it; the answers are decoded as one ordinary batch.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from threading import Thread
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, TextIteratorStreamer

from qlora_lite.base.generation_settings import stop_ids
from qlora_lite.data.batches import Batch, pack_trees
from qlora_lite.data.template import ChatTemplate, Encoded
from qlora_lite.data.trees import grow
from qlora_lite.device.numerics import exact_sums
from qlora_lite.memory.measuring import give_back_free_memory
from qlora_lite.model.attention import attention_for_generation, attention_on_packed_rows
from qlora_lite.model.forward import causal_lm, device_of, may_share
from qlora_lite.model.residency import residency_of

BATCH_TOKENS = 4096  # prompt tokens per batch, including padding; a plan may choose fewer


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    stop_token: int,
    max_new_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
    share_prefixes: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """One greedy answer per prompt (token ids from `data.template.encode_prompt`), in their order, stop token removed.

    A batch has at most `batch_tokens` prompt tokens including padding, or one prompt; with `share_prefixes`, a common prefix of its
    prompts is read once. An answer also ends at the stop tokens of the model's own generation settings, as in plain `generate`.
    `progress(done)` is called per batch.
    """
    answers: dict[int, str] = {}
    lengths = [len(prompt) for prompt in prompts]
    share_prefixes = share_prefixes and min(lengths, default=0) > 1 and may_share(model, max(lengths))
    stops = stop_tokens(model, stop_token)
    batches = tree_batches(prompts, batch_tokens) if share_prefixes else length_batches(lengths, batch_tokens)
    with generating(model):
        for indices in batches:
            batch_prompts = [prompts[i] for i in indices]
            ids_BT, mask_BT = _pad_left(batch_prompts, pad=stop_token)
            width = ids_BT.shape[1]
            config = greedy(stop_token=stop_token, max_new_tokens=max_new_tokens)
            cache = None
            if share_prefixes:
                tree = pack_trees(_Prompts(batch_prompts), range(len(batch_prompts)))
                cache = read_prompts(model, tree)
                # `read_prompts` returns them in the tree's order
                ids_BT, mask_BT, indices = (
                    ids_BT[list(tree.rows)],
                    mask_BT[list(tree.rows)],
                    [indices[i] for i in tree.rows],
                )
            output = generate_batch(model, ids_BT, mask_BT, config=config, cache=cache)
            del cache
            for i, ids in zip(indices, output[:, width:].tolist(), strict=True):
                end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
                answers[i] = tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
            give_back_free_memory()
            if progress is not None:
                progress(len(answers))
    return [answers[i] for i in range(len(prompts))]


def stream_answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: Any,
    prompt: list[int],
    *,
    stop_token: int,
    max_new_tokens: int,
) -> Iterator[str]:
    """Yield pieces of text of one greedy answer as they are generated."""
    stops = stop_tokens(model, stop_token)
    streamer = TextIteratorStreamer(Without(tokenizer, stops, besides=True), skip_prompt=True, skip_special_tokens=True)
    ids_1T = torch.tensor([prompt])
    failure: list[BaseException] = []

    def work() -> None:
        try:
            config = greedy(stop_token=stops, max_new_tokens=max_new_tokens)
            generate_batch(model, ids_1T, torch.ones_like(ids_1T), config=config, streamer=streamer)
        except BaseException as error:  # raised below, in the reader's thread
            failure.append(error)
            streamer.end()

    with generating(model):
        thread = Thread(target=work, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
    if failure:
        raise failure[0]


@contextmanager
def generating(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Inside, eval mode, padded attention, and a streamed head on the device; restore the previous state afterwards."""
    was_training = model.training
    model.eval()
    base = causal_lm(model)
    head, residency = base.get_output_embeddings().register_forward_pre_hook(_contiguous), residency_of(base)
    try:
        with attention_for_generation(base), nullcontext() if residency is None else residency.head():
            yield
    finally:
        head.remove()
        model.train(was_training)


def _contiguous(head: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Copy the last positions to contiguous memory: otherwise `linear` multiplies row by row, and on the CPU copies the head for each."""
    return (inputs[0].contiguous(),)


@torch.inference_mode(False)
@torch.no_grad()
def generate_batch(
    model: PreTrainedModel | PeftModel,
    ids_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    config: GenerationConfig,
    streamer: TextIteratorStreamer | None = None,
    cache: Cache | None = None,
) -> torch.Tensor:
    """Token ids [B, T + new] from left-padded prompts [B, T]; `cache` has the keys and values of their first tokens."""
    device = device_of(model)
    with exact_sums(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about sampling settings of the model's own generation config
        return causal_lm(model).generate(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            generation_config=config,
            streamer=streamer,
            past_key_values=cache,
        )


class Without:
    """A tokenizer that skips `ids` along with special tokens (`besides`), or instead of them."""

    def __init__(self, tokenizer: Any, ids: Collection[int], *, besides: bool) -> None:
        self._tokenizer, self._skipped, self._besides = tokenizer, frozenset(ids), besides

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False, **settings: Any) -> str:
        kept = [token_id for token_id in ids if not (skip_special_tokens and token_id in self._skipped)]
        skips = skip_special_tokens and self._besides
        return str(self._tokenizer.decode(kept, skip_special_tokens=skips, **settings))


def answer_tokenizer(tokenizer: Any, template: ChatTemplate) -> Without:
    """The tokenizer for answers: it skips only special tokens that an answer cannot contain; the others belong to the text."""
    return Without(tokenizer, template.hidden_ids, besides=False)


def stop_tokens(model: PreTrainedModel | PeftModel, stop_token: int) -> list[int]:
    """The tokens that end an answer: the trained stop token, and those of plain `generate` for this model."""
    settings = causal_lm(model).generation_config
    return list(dict.fromkeys([stop_token, *stop_ids(settings.eos_token_id)]))


def greedy(*, stop_token: int | list[int], max_new_tokens: int) -> GenerationConfig:
    """Settings for greedy decoding, until a stop token or `max_new_tokens`."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=stop_token,
        pad_token_id=stop_token if isinstance(stop_token, int) else stop_token[0],
    )


@torch.no_grad()
def read_prompts(model: PreTrainedModel | PeftModel, tree: Batch) -> Cache:
    """Keys and values of all but the last token of each example of `tree`, left-padded, for `generate_batch`."""
    base = causal_lm(model)
    config = base.config.get_text_config(decoder=True)
    paths = [path[:-1] for path in tree.paths]
    width = max(map(len, paths))
    places_BT = torch.tensor([[0] * (width - len(path)) + path for path in paths]).to(
        device_of(base)
    )  # 0: hidden by the mask
    row = DynamicCache()  # without config: a sliding window would keep only the end
    cache = DynamicCache(config=config)
    tree = tree.to(device_of(base))
    with exact_sums(), attention_on_packed_rows(base):
        base.get_decoder()(
            input_ids=tree.input_ids_1T, position_ids=tree.position_ids_1T, lengths=tree.lengths, parents=tree.parents,
            past_key_values=row, use_cache=True,
        )  # fmt: skip
    for index, layer in enumerate(row.layers):
        keys, values = (tensor[0, :, places_BT].transpose(0, 1).contiguous() for tensor in (layer.keys, layer.values))
        cache.update(keys, values, index)
        layer.keys = layer.values = None  # free the copies of the packed sequence
    return cache


class _Prompts:
    """Prompts as examples whose last token is unshared."""

    def __init__(self, prompts: Sequence[list[int]]) -> None:
        self._prompts = prompts
        self.lengths = np.array([len(prompt) for prompt in prompts])

    def encoded(self, index: int) -> Encoded:
        length = len(self._prompts[index])
        return Encoded(self._prompts[index], ((length - 1, length),))


def tree_batches(prompts: Sequence[list[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices, prompts with a common prefix together, of at most `batch_tokens` tokens with padding (or one prompt)."""
    batch, width = list[int](), 0
    for index in grow(_Prompts(prompts), range(len(prompts))).top.all_rows():
        wider = max(width, len(prompts[index]))
        if batch and wider * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, wider = [], len(prompts[index])
        batch.append(index)
        width = wider
    if batch:
        yield batch


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices, longest prompts first, of at most `batch_tokens` tokens with padding (or one prompt)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, batch_tokens // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def _pad_left(prompts: Sequence[list[int]], *, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (ids [B, T], mask [B, T]), padded left, so that every prompt ends where generation begins."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
