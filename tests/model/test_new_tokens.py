"""data.special_tokens: one id each, rows where there are none, trained alone, in checkpoint, plain peft, merge and proof."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lite import evaluate, load_model, load_recipe, make_plan, merge, train
from qlora_lite.api import open_run, run_models
from qlora_lite.base.artefact import quantize_base
from qlora_lite.data.template import Encoded
from qlora_lite.merging import merge as merge_files
from qlora_lite.merging.write import MergeOptions
from qlora_lite.model.adapter import Lora, attach_adapter, save_adapter
from qlora_lite.model.load import LoadedBase, load_base, load_tokenizer
from qlora_lite.training.optimizer import make_optimizer
from qlora_lite.training.step import forward_backward
from tests.plain_peft import assert_plain_peft_computes_the_same
from tests.tiny_model import Rows, gradients, save_tiny_llama, split_batches
from tests.tiny_run import write_recipe

TOKENS = ["<|fact|>", "<|end_fact|>"]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def artefact(request, tmp_path) -> Path:
    source = save_tiny_llama(tmp_path / "source", tie_word_embeddings=request.param)
    return quantize_base(source, cache=tmp_path / "cache")


def loaded(artefact: Path) -> LoadedBase:
    return load_base(artefact, device="cpu", special_tokens=TOKENS)


def rows_with(ids: list[int]) -> Rows:
    """Examples that read and say the new tokens."""
    return Rows(
        [Encoded([5, 9, ids[0], 40, ids[1], 7], spans=((3, 6),)), Encoded([8, ids[1], 30, ids[0], 2], spans=((2, 5),))]
    )


def trained(artefact: Path, num_steps: int = 8) -> tuple[PeftModel, list[int], Rows]:
    base = loaded(artefact)
    ids = base.tokenizer.convert_tokens_to_ids(TOKENS)
    model, rows = attach_adapter(base.model, Lora(r=4, lora_alpha=8), new_token_ids=ids), rows_with(ids)
    optimizer = make_optimizer(model.named_parameters(), name="adamw", learning_rate=1e-2, weight_decay=0.0)
    model.train()
    for _ in range(num_steps):
        batches = split_batches(rows, 1)
        forward_backward(model, batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval(), ids, rows


def test_each_token_is_one_id_and_has_a_row_that_begins_as_the_mean(artefact):
    base, plain = loaded(artefact), load_base(artefact, device="cpu")
    size = len(plain.tokenizer)
    assert base.tokenizer("<|fact|>a", add_special_tokens=False)["input_ids"][0] == size
    for get in ("get_input_embeddings", "get_output_embeddings"):
        weight, before = (getattr(one.model, get)().weight for one in (base, plain))
        assert torch.equal(weight[:size], before)
        torch.testing.assert_close(weight[size:].float(), before.float().mean(0).expand(2, -1), rtol=0.01, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.model.config.vocab_size == size + 2


def test_a_token_that_is_there_already_is_not_added_again(artefact):
    tokenizer = load_tokenizer(artefact, special_tokens=["<|im_end|>"])
    assert len(tokenizer) == len(load_tokenizer(artefact))


def test_only_the_new_rows_are_trained_with_gradients_in_fp32(artefact):
    base = loaded(artefact)
    ids = base.tokenizer.convert_tokens_to_ids(TOKENS)
    model = attach_adapter(base.model, Lora(r=4, lora_alpha=8), new_token_ids=ids).train()
    batches = split_batches(rows_with(ids), 1)
    forward_backward(model, batches)
    rows = {name: p for name, p in model.named_parameters() if "trainable_tokens_delta" in name}
    is_tied = base.model.config.tie_word_embeddings
    assert len(rows) == (1 if is_tied else 2)
    assert all(p.shape == (2, 64) and p.grad.dtype == torch.float32 and p.grad.norm() > 0 for p in rows.values())
    others = [name for name, p in model.named_parameters() if p.requires_grad and name not in rows]
    assert others and all(".lora_" in name for name in others)


def test_our_layer_computes_what_pefts_does_and_plain_peft_reads_the_files(artefact, tmp_path):
    model, ids, rows = trained(artefact)
    assert_plain_peft_computes_the_same(
        model,
        loaded(artefact).model,
        rows.encoded(0).input_ids,
        base=artefact,
        folder=tmp_path / "adapter",
        num_tokens=ids[-1] + 1,
    )


def test_splitting_a_step_does_not_change_their_gradient(artefact):
    ids = loaded(artefact).tokenizer.convert_tokens_to_ids(TOKENS)
    two = rows_with(ids)
    rows = Rows([two.encoded(0), two.encoded(1), two.encoded(1), two.encoded(0)])
    one, four = (
        gradients(
            attach_adapter(loaded(artefact).model, Lora(r=4, lora_alpha=8), new_token_ids=ids), split_batches(rows, num)
        )
        for num in (1, 4)
    )
    names = [name for name in one if "trainable_tokens" in name]
    assert names
    for name in names:
        assert one[name].norm() > 0 and (one[name] - four[name]).norm() < 1e-5 * one[name].norm()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_merge_has_the_rows_and_is_proved_on_them(artefact, tmp_path, scale):
    model, ids, rows = trained(artefact)
    save_adapter(model, tmp_path / "adapter", base_name="base")
    encoded = [rows.encoded(i) for i in range(len(rows))]
    result = merge_files(
        artefact, tmp_path / "adapter", tmp_path / "merged", encoded, options=MergeOptions(scale=scale)
    )
    assert result.adapter_effect > 1 and result.arithmetic_ratio < 0.01
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype=torch.bfloat16)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (values,) = [tensor for name, tensor in saved.items() if "embed_tokens" in name]
    assert torch.equal(merged.get_input_embeddings().weight[ids], values)
    assert merged.config.vocab_size == ids[-1] + 1
    before = load_file(artefact / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(merged.get_input_embeddings().weight[: ids[0]], before)


def test_a_run_with_new_tokens_from_recipe_to_merged_folder(tmp_path):
    recipe = write_recipe(tmp_path)
    settings = ['data.special_tokens=["<|fact|>", "<|end_fact|>"]', "train.learning_rate=5e-3"]
    plan = make_plan(load_recipe(recipe, overrides=settings))
    model = load_model(plan)
    list(train(plan, model, tmp_path / "run"))
    tuned = evaluate(plan, model).loss
    run, again = open_run(tmp_path / "run")
    (read,) = run_models(again, run, ["adapter"])
    assert evaluate(again, read).loss == pytest.approx(tuned, abs=1e-3)
    result = merge(plan, tmp_path / "run")
    for folder in (run.adapter, result.out):
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        assert tokenizer("<|fact|>", add_special_tokens=False)["input_ids"] == tokenizer.convert_tokens_to_ids(
            ["<|fact|>"]
        )
    assert result.adapter_effect > 0 and result.arithmetic_ratio < 0.01


def test_full_training_keeps_the_new_tokens_too(tmp_path):
    recipe = write_recipe(tmp_path)
    plan = make_plan(
        load_recipe(recipe, overrides=["data.special_tokens=[<|fact|>]", "method=full", "train.max_steps=2"])
    )
    model = load_model(plan)
    list(train(plan, model, tmp_path / "run"))
    weights = load_base(tmp_path / "run" / "weights", device="cpu")
    assert len(weights.tokenizer) == weights.model.get_input_embeddings().weight.shape[0] == len(model.tokenizer)
