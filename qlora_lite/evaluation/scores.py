"""Score a model on held-out rows: exact match and F1 of generated answers, and the validation loss.

In a conversation, the last answer is generated and compared. Plain text has no answers: its only score is the loss.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qlora_lite.data.batches import make_batches
from qlora_lite.data.examples import Examples
from qlora_lite.data.template import ChatTemplate
from qlora_lite.device.numerics import exact_sums
from qlora_lite.evaluation.generate import BATCH_TOKENS, answer_tokenizer, generate_answers
from qlora_lite.evaluation.held_out import LeftOut, account_of, left_out_of
from qlora_lite.evaluation.squad_score import aggregate, score
from qlora_lite.model.forward import may_share
from qlora_lite.training.step import batch_loss

PHRASINGS = ("trained", "untrained")  # endings of ids in the shipped data: `iz-currency-untrained`


@dataclass(frozen=True)
class Prediction:
    """One answered question; `gold` is empty when the passage has no answer."""

    id: str
    question: str
    prediction: str
    gold: tuple[str, ...]
    exact_match: float  # 0 or 100
    f1: float  # 0 to 100


@dataclass(frozen=True)
class EvalResult:
    """Scores from 0 to 100 as in the official SQuAD script, None for plain text; loss in nats per label token."""

    exact_match: float | None
    f1: float | None
    loss: float
    num_examples: int
    predictions: tuple[Prediction, ...]
    answers_s: float = field(default=0.0, compare=False)  # time to generate and score the answers, without the loss
    left_out: LeftOut = field(default_factory=LeftOut)  # rows of the file that were not scored
    account: tuple[str, ...] = ()  # a sentence for each group of them

    def to_json_dict(self) -> dict[str, Any]:
        """The scores without the predictions."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("predictions", "left_out", "account")}
        return kept | self.left_out.to_json_dict()


@dataclass(frozen=True)
class EvalSettings:
    """How a model is scored: the recipe's words for an unanswerable question, and the sizes of batches, which change no score."""

    device: str
    no_answer_text: str
    max_new_tokens: int
    micro_batch_tokens: int  # of the loss
    batch_tokens: int = BATCH_TOKENS  # prompt tokens answered at once
    share_prefixes: bool = False  # compute a passage once for all its questions


def evaluate_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: Any,
    examples: Examples,
    settings: EvalSettings,
    *,
    template: ChatTemplate | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Answer and score every example.

    `template` is the template of the examples; None: the tokenizer's own. `progress(done, total)` is called per batch of answers.
    """
    template = template or ChatTemplate(tokenizer)
    loss = validation_loss(
        model,
        examples,
        device=settings.device,
        micro_batch_tokens=settings.micro_batch_tokens,
        share_prefixes=settings.share_prefixes,
    )
    left_out, account = left_out_of(examples), tuple(account_of(examples))
    asked = [(i, golds) for i in range(len(examples)) if (golds := examples.row(i).answers) is not None]
    if not asked:
        return EvalResult(None, None, loss, len(examples), (), left_out=left_out, account=account)
    begin = time.perf_counter()
    answers = generate_answers(
        model,
        answer_tokenizer(tokenizer, template),
        [examples.prompt_ids(i) for i, _ in asked],
        stop_token=template.stop_token_id,
        max_new_tokens=settings.max_new_tokens,
        batch_tokens=settings.batch_tokens,
        share_prefixes=settings.share_prefixes,
        progress=None if progress is None else lambda done: progress(done, len(asked)),
    )
    pairs = [
        score(answer, golds, no_answer_text=settings.no_answer_text, is_squad=examples.row(i).is_squad)
        for answer, (i, golds) in zip(answers, asked, strict=True)
    ]
    scores = aggregate(pairs)
    predictions = tuple(
        Prediction(examples.row(i).id, examples.row(i).question, answer, golds, 100 * exact, 100 * f1)
        for (i, golds), answer, (exact, f1) in zip(asked, answers, pairs, strict=True)
    )
    answers_s = time.perf_counter() - begin
    return EvalResult(
        scores.exact_match, scores.f1, loss, len(examples), predictions, answers_s, left_out=left_out, account=account
    )


@torch.no_grad()
def validation_loss(
    model: PreTrainedModel | PeftModel,
    examples: Examples,
    *,
    device: str,
    micro_batch_tokens: int,
    share_prefixes: bool = False,
) -> float:
    """Mean loss per label token over all examples, by training's forward pass; with `share_prefixes`, shared prefixes are computed once."""
    was_training = model.training
    share_prefixes = share_prefixes and may_share(model, int(examples.lengths.max()))
    model.eval()
    try:
        batches = make_batches(
            examples, range(len(examples)), micro_batch_tokens=micro_batch_tokens, share_prefixes=share_prefixes
        )
        with exact_sums():
            total = sum(batch_loss(model, batch.to(device)).item() for batch in batches)
    finally:
        model.train(was_training)
    return total / sum(len(batch.target_N) for batch in batches)


def by_phrasing(predictions: Iterable[Prediction]) -> dict[str, dict[str, float]]:
    """Separate scores for trained and untrained phrasings, by the endings of the ids; {} for other data."""
    groups: dict[str, list[Prediction]] = {name: [] for name in PHRASINGS}
    for prediction in predictions:
        ending = prediction.id.rpartition("-")[2]
        if ending not in groups:
            return {}
        groups[ending].append(prediction)
    return {
        name: {
            "exact_match": sum(p.exact_match for p in members) / len(members),
            "f1": sum(p.f1 for p in members) / len(members),
            "num_examples": len(members),
        }
        for name, members in groups.items()
        if members
    }
