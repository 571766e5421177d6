"""One packed row through the decoder: token ids in, the hidden states that predict a label out."""

import torch
from peft import PeftModel
from transformers import PreTrainedModel


def causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model itself, with or without an adapter around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def predicting_states(
    model: PreTrainedModel | PeftModel,
    *,
    input_ids_1T: torch.Tensor,
    position_ids_1T: torch.Tensor,
    lengths: tuple[int, ...],
    predictor_N: torch.Tensor,
) -> torch.Tensor:
    """Last hidden states [N, D] at the positions `predictor_N` of a packed row of T tokens (see data/batches.py)."""
    decoder = causal_lm(model).get_decoder()
    output = decoder(input_ids=input_ids_1T, position_ids=position_ids_1T, use_cache=False, lengths=lengths)
    return output.last_hidden_state[0, predictor_N]
