"""One packed sequence through the decoder: token ids in, the hidden states that predict a label out."""

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qlora_lite.model.attention import packs_rows, why_not_shared
from qlora_lite.model.residency import residency_of


def causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside an optional adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def device_of(model: PreTrainedModel | PeftModel) -> torch.device:
    """The device that computes; the embeddings of a model may be elsewhere."""
    base = causal_lm(model)
    residency = residency_of(base)
    return base.device if residency is None else residency.device


def may_share(model: PreTrainedModel | PeftModel, length: int) -> bool:
    """Whether examples of at most `length` tokens can share a prefix in this model."""
    base = causal_lm(model)
    return why_not_shared(type(base), base.config, length=length) is None


def predicting_states(
    model: PreTrainedModel | PeftModel,
    *,
    input_ids_1T: torch.Tensor,
    position_ids_1T: torch.Tensor,
    lengths: tuple[int, ...],
    parents: tuple[int, ...],
    predictor_N: torch.Tensor,
) -> torch.Tensor:
    """Last hidden states [N, D] at the positions `predictor_N` of a packed sequence of T tokens (see data/batches.py).

    A model whose attention cannot separate the examples of a sequence (BLOOM, Falcon) runs them one at a time.
    """
    base = causal_lm(model)
    decoder, residency = base.get_decoder(), residency_of(base)
    if packs_rows(base) and residency is not None:
        return residency.states_at(
            predictor_N, input_ids_1T=input_ids_1T, position_ids_1T=position_ids_1T, lengths=lengths, parents=parents
        )
    if packs_rows(base):
        output = decoder(
            input_ids=input_ids_1T, position_ids=position_ids_1T, use_cache=False, lengths=lengths, parents=parents
        )
        return output.last_hidden_state[0, predictor_N]
    ids_of_examples = input_ids_1T.split(lengths, 1)
    if residency is not None:
        return torch.cat([residency.states_of_example(ids) for ids in ids_of_examples])[predictor_N]
    examples = [decoder(input_ids=ids, use_cache=False).last_hidden_state[0] for ids in ids_of_examples]
    return torch.cat(examples)[predictor_N]
