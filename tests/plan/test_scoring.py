"""Evaluation rehearsed on the meta device: against the real ledger, the allocator, and every layer of a deep model."""

from dataclasses import replace

import pytest
import torch

from qlora_lite.base.source import load_config
from qlora_lite.data.batches import pack_batch
from qlora_lite.data.template import Encoded
from qlora_lite.evaluation.generate import generate_answers, generate_batch, generating, greedy, length_batches
from qlora_lite.memory.ledger import Ledger
from qlora_lite.memory.measuring import measure_allocations
from qlora_lite.model.forward import causal_lm
from qlora_lite.plan.compare import Comparison, Rehearsals, as_json
from qlora_lite.plan.rehearsal import PARTS, MicroBatch, Scene, Stage, layer_period, num_labels, residents, with_depth
from qlora_lite.plan.scoring import Scoring, evaluation_moments, rehearse_evaluation
from qlora_lite.plan.workspace import workspace_of
from qlora_lite.training.step import batch_loss
from tests.architectures import artefact, published
from tests.promises.test_promise_06_plan import CPU, lengthened, real_model
from tests.tiny_model import tiny_source

VALIDATION = MicroBatch(100, 4)
STOP_TOKENS = 16  # bytes: `generate` makes two tensors of Python numbers, which no ledger sees on meta
MANY_SHORT, FEW_LONG = (9, 8, 7, 8, 5) * 8, (300, 270, 250, 200)


class Ids:
    """A tokenizer whose text is the ids."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def config():
    return load_config(tiny_source())


@pytest.fixture(scope="module")
def stage(config):
    return Stage(config, CPU)


def random_prompts(lengths):
    torch.manual_seed(0)
    return [torch.randint(3, 200, (length,)).tolist() for length in lengths]


def resident_bytes(scene: Scene) -> int:
    return sum({id(t): t.nbytes for tensors in residents(scene.model).values() for t in tensors}.values())


@pytest.mark.parametrize("lengths", [FEW_LONG[:1], FEW_LONG])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_generating_on_meta_holds_what_generating_does_to_the_byte(name, lengths):
    """Prompt and two steps, with a sliding window and without, padded and not; where the values of a mask are asked for, too."""
    model = real_model(CPU, quantized=None if name == "llama" else artefact(name))
    width, num = max(lengths), len(lengths)
    ids_BT, mask_BT = torch.ones(num, width, dtype=torch.int64), torch.ones(num, width, dtype=torch.int64)
    mask_BT[1:, :10] = 0
    ledger = Ledger(workspace=workspace_of(CPU.card, num_threads=CPU.num_threads))
    for category, tensors in residents(model).items():
        ledger.hold(category, *tensors)
    ledger.hold("activations", ids_BT, mask_BT)
    with ledger, generating(model):
        generate_batch(model, ids_BT, mask_BT, config=greedy(stop_token=319, max_new_tokens=3))
    scene = Scene(causal_lm(model).config, CPU)
    found = evaluation_moments(scene, Scoring(VALIDATION, lengths, max_new_tokens=3))
    planned = found[f"prompt, {num} of {width} tokens"]
    assert planned | {"activations": planned["activations"] + STOP_TOKENS} == ledger.peak


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize(
    ("lengths", "max_new_tokens", "batch_tokens"),
    [
        (MANY_SHORT, 60, 4096),  # the cache is dearest, at the last step
        (FEW_LONG, 2, 4096),
        (FEW_LONG, 12, 4096),  # the mask of the prompts
        (FEW_LONG + MANY_SHORT, 8, 1000),  # batches of both kinds
    ],
)
def test_the_planned_peak_of_answering_meets_the_allocators(method, lengths, max_new_tokens, batch_tokens):
    settings = replace(CPU, method=method)
    model, prompts = real_model(settings), random_prompts(lengths)

    def answer(num_tokens: int) -> list[str]:
        return generate_answers(
            model, Ids(), prompts, stop_token=319, max_new_tokens=num_tokens, batch_tokens=batch_tokens
        )

    answer(2)  # makes what is made once
    with measure_allocations("cpu") as allocations:
        answers = answer(max_new_tokens)
    assert max(len(text.split()) for text in answers) == max_new_tokens
    scene = Scene(causal_lm(model).config, settings)
    moments = evaluation_moments(scene, Scoring(VALIDATION, lengths, max_new_tokens, batch_tokens))
    planned = max(sum(parts.values()) for name, parts in moments.items() if name != "validation")
    assert resident_bytes(scene) + allocations.peak_bytes == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize(
    ("name", "within"),
    [("gemma3_text", 0.01), ("mistral", 0.01), ("bloom", 0.01), ("qwen3", 0.01), ("falcon_alibi", 0.05)],
)
def test_so_it_does_for_other_architectures(name, within):
    """Where a matrix product is dearest, as in Falcon, what it packs for itself is left out: 100 KB a thread, much in so small a model."""
    model, prompts = real_model(CPU, quantized=artefact(name)), random_prompts(FEW_LONG)
    answer = (model, Ids(), prompts)
    generate_answers(*answer, stop_token=319, max_new_tokens=4)
    with measure_allocations("cpu") as allocations:
        generate_answers(*answer, stop_token=319, max_new_tokens=4)
    scene = Scene(causal_lm(model).config, CPU)
    moments = evaluation_moments(scene, Scoring(VALIDATION, FEW_LONG, 4))
    planned = max(sum(parts.values()) for moment, parts in moments.items() if moment != "validation")
    assert resident_bytes(scene) + allocations.peak_bytes == pytest.approx(planned, rel=within)


def test_the_planned_peak_of_the_validation_loss_meets_the_allocators(config):
    model, micro_batch = real_model(CPU).eval(), MicroBatch(400, 4)
    labels = num_labels(micro_batch)
    batch = pack_batch([Encoded([0] * 400, ((400 - labels, 400),))] * 4, range(4))
    with torch.no_grad():
        batch_loss(model, batch)
        with measure_allocations("cpu") as allocations:
            batch_loss(model, batch)
    scene = Scene(config, CPU)
    parts = evaluation_moments(scene, Scoring(micro_batch))["validation"]
    held = sum(t.nbytes for t in (batch.input_ids_1T, batch.position_ids_1T, batch.predictor_N, batch.target_N))
    planned = sum(parts.values()) - parts["optimizer"]
    assert resident_bytes(scene) + held + allocations.peak_bytes == pytest.approx(planned, rel=0.01)


def test_the_validation_loss_interrupts_training_and_answers_do_not(config):
    scene = Scene(config, CPU)
    state = scene.rehearse(MicroBatch(100)).parts["optimizer"]
    found = evaluation_moments(scene, Scoring(VALIDATION, FEW_LONG))
    assert state > 0 and found["validation"]["optimizer"] == state
    assert all("optimizer" not in parts for name, parts in found.items() if name != "validation")
    assert all("gradients" not in parts or not parts["gradients"] for parts in found.values())


@pytest.mark.parametrize("name", ["llama3", "gemma3_text", "falcon_alibi"])
def test_two_depths_tell_what_evaluating_any_depth_holds(name):
    config = load_config(published(name))
    depth = 5 * layer_period(config) + (1 if layer_period(config) > 1 else 0)
    deep = with_depth(lengthened(config, depth), depth)
    scoring = Scoring(MicroBatch(50, 2), (60, 50, *(9,) * 40), max_new_tokens=30, batch_tokens=300)
    assert len(scoring.batches) == 2
    planned = Stage(deep, CPU).rehearse_phases(lambda scene: evaluation_moments(scene, scoring))
    assert len(planned) == 5 and planned == evaluation_moments(Scene(deep, CPU), scoring)


def test_the_two_batches_that_are_rehearsed_are_the_dearest(stage):
    prompts = (400, 350, 180, 120, *(90,) * 5, *(40,) * 30, *(20,) * 60, *(8,) * 200)
    scoring = Scoring(VALIDATION, prompts, max_new_tokens=32, batch_tokens=800)
    peak = sum(rehearse_evaluation(stage, scoring).values())
    for batch in length_batches(prompts, 800):
        alone = replace(scoring, prompts=tuple(prompts[i] for i in batch))
        assert sum(rehearse_evaluation(stage, alone).values()) <= peak


def test_smaller_batches_of_prompts_never_need_more(stage):
    scorings = [
        Scoring(VALIDATION, FEW_LONG + MANY_SHORT, batch_tokens=tokens) for tokens in (100, 300, 700, 1500, 4096)
    ]
    peaks = [sum(rehearse_evaluation(stage, scoring).values()) for scoring in scorings]
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1]


def test_a_runs_peak_is_its_largest_phase(config):
    comparison, batch = Comparison(Rehearsals(config), CPU), MicroBatch(100, 2)
    without = comparison.rehearse("qlora", batch)
    small = comparison.rehearse("qlora", batch, Scoring(batch, FEW_LONG[-1:]))
    large = comparison.rehearse("qlora", batch, Scoring(batch, FEW_LONG))
    assert small.phases == without.phases | {"evaluate": small.phases["evaluate"]}
    assert (small.phase, small.peak_bytes) == (without.phase, without.peak_bytes)
    assert large.phase == "evaluate" and large.peak_bytes > without.peak_bytes
    assert tuple(large.parts) == PARTS and sum(large.parts.values()) == large.peak_bytes
    assert as_json(large)["phases"]["evaluate"]["peak_bytes"] == large.peak_bytes


def test_without_prompts_only_the_loss_is_evaluated(config):
    assert evaluation_moments(Scene(config, CPU), Scoring(VALIDATION)).keys() == {"validation"}
