"""Batched greedy answers are what one-by-one greedy decoding gives, and generating leaves the model as it was."""

import pytest
import torch

from qlora_lite.data.batches import pack_trees
from qlora_lite.evaluation import generate
from qlora_lite.evaluation.generate import generate_answers, generating, length_batches, stream_answer
from qlora_lite.memory.measuring import measure_allocations
from qlora_lite.model.attention import PACKED, attention_for_generation
from qlora_lite.model.forward import causal_lm
from qlora_lite.model.load import load_base
from tests.architectures import artefact, widen_windows
from tests.data.tiny_tokenizer import make_tokenizer
from tests.tiny_model import random_rows, tiny_adapted

NEVER = 319  # a token that this model never picks: answers run to their full length
LENGTH = 6


class Ids:
    """A tokenizer whose text is the ids."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def model():
    return tiny_adapted(compute=torch.float32, factors=torch.float32)


@pytest.fixture(scope="module")
def prompts():
    rows = random_rows([1] * 5, prompt=(3, 30))
    return [rows.encoded(i).input_ids for i in range(5)]


@pytest.fixture(scope="module")
def one_by_one(model, prompts):
    """Greedy ids of each prompt alone: no batch, no padding, no cache, no `generate`."""
    answers = []
    with torch.no_grad(), attention_for_generation(causal_lm(model)):
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(LENGTH):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            answers.append(ids[len(prompt) :])
    assert not any(NEVER in answer for answer in answers)
    assert len({tuple(answer) for answer in answers}) > 1
    return answers


def text(ids):
    return " ".join(map(str, ids))


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_batched_left_padded_answers_equal_one_by_one_answers(model, prompts, one_by_one, batch_tokens):
    done = []
    answers = generate_answers(
        model, Ids(), prompts, stop_token=NEVER, max_new_tokens=LENGTH, batch_tokens=batch_tokens, progress=done.append
    )
    assert answers == [text(ids) for ids in one_by_one]
    assert done == sorted(done) and done[-1] == len(prompts)
    assert len(done) == {1: 5, 4096: 1}.get(batch_tokens, len(done))


@pytest.mark.parametrize("batch_tokens", [1, 60, 200, 4096])
def test_prompts_that_share_their_beginning_are_answered_as_one_by_one(model, batch_tokens):
    """A passage with questions, a header over two passages, one prompt inside another, and some that share nothing."""
    header, passage = list(range(20, 60)), list(range(100, 130))
    prompts = [
        header + passage + [5],
        header + passage + [6, 7, 8],
        header + passage,
        header + passage[:20] + [9] * 20,
        [3, 4],
        [3, 5, 6],
    ]
    together = generate_answers(
        model, Ids(), prompts, stop_token=NEVER, max_new_tokens=LENGTH, batch_tokens=batch_tokens, share_prefixes=True
    )
    alone = [generate_answers(model, Ids(), [prompt], stop_token=NEVER, max_new_tokens=LENGTH)[0] for prompt in prompts]
    assert together == alone and len(set(alone)) > 2


@pytest.mark.parametrize("window", [64, 72, 90])
@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_so_they_are_by_a_model_whose_window_ends_within_the_answer(name, window):
    """Or within the longest prompt, which then is not read as a tree. The row of all prompts is longer than any window."""
    base = load_base(artefact(name), device="cpu", compute=torch.float32).model
    widen_windows(base, window)
    header, passage = list(range(20, 50)), list(range(50, 80))
    prompts = [header + passage + own for own in ([5], [6, 7, 8], [9] * 9, [4, 3])] + [[*header, 17, 16]]
    together = generate_answers(base, Ids(), prompts, stop_token=NEVER, max_new_tokens=LENGTH, share_prefixes=True)
    alone = [generate_answers(base, Ids(), [prompt], stop_token=NEVER, max_new_tokens=LENGTH)[0] for prompt in prompts]
    assert together == alone and len(set(alone)) > 2


def test_what_prompts_share_is_read_once(model, monkeypatch):
    seen = []
    monkeypatch.setattr(generate, "pack_trees", lambda *args: seen.append(pack_trees(*args)) or seen[-1])
    prompts = [[*range(20, 60), last] for last in range(5, 10)]
    generate_answers(model, Ids(), prompts, stop_token=NEVER, max_new_tokens=2, share_prefixes=True)
    assert [batch.input_ids_1T.shape[1] for batch in seen] == [40 + 5]


def test_an_answer_ends_before_the_stop_token_while_others_go_on(model, prompts, one_by_one):
    stop = one_by_one[0][2]
    answers = generate_answers(model, Ids(), prompts, stop_token=stop, max_new_tokens=LENGTH)
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in one_by_one]
    assert answers == [text(ids) for ids in expected]
    assert len(expected[0]) <= 2


def test_the_head_is_not_copied_for_every_prompt():
    """PyTorch's `linear` multiplies inputs that are not in one piece row by row, on the CPU each with a copy of the weight."""
    model, prompts = tiny_adapted(), [[3, 4, 5]] * 200
    head_bytes = causal_lm(model).get_output_embeddings().weight.nbytes
    with measure_allocations("cpu") as allocations:
        generate_answers(model, Ids(), prompts, stop_token=NEVER, max_new_tokens=1)
    assert allocations.peak_bytes < 100 * head_bytes


def test_no_prompts_give_no_answers(model):
    assert generate_answers(model, Ids(), [], stop_token=NEVER, max_new_tokens=LENGTH) == []


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_attention_are_restored(model, prompts, training):
    model.train(training)
    generate_answers(model, Ids(), prompts[:1], stop_token=NEVER, max_new_tokens=1)
    assert model.training is training and causal_lm(model).config._attn_implementation == PACKED
    with pytest.raises(ZeroDivisionError), generating(model):
        assert not model.training
        raise ZeroDivisionError
    assert model.training is training and causal_lm(model).config._attn_implementation == PACKED
    model.eval()


def test_a_streamed_answer_is_the_batched_answer(model, prompts):
    tokenizer = make_tokenizer()
    (whole,) = generate_answers(model, tokenizer, prompts[:1], stop_token=NEVER, max_new_tokens=LENGTH)
    pieces = list(stream_answer(model, tokenizer, prompts[0], stop_token=NEVER, max_new_tokens=LENGTH))
    assert "".join(pieces).strip() == whole
    assert causal_lm(model).config._attn_implementation == PACKED


def test_a_failure_while_streaming_reaches_the_reader(model):
    with pytest.raises(IndexError):
        list(stream_answer(model, make_tokenizer(), [10**6], stop_token=NEVER, max_new_tokens=2))
    assert causal_lm(model).config._attn_implementation == PACKED


def test_batches_are_long_first_and_never_wider_than_allowed():
    lengths = [3, 10, 50, 4, 9, 5]
    batches = list(length_batches(lengths, 20))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 20 for batch in batches)
    assert batches[0] == [2]
