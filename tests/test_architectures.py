"""Every supported architecture, from files as they are published to a proved merge and an answer (tests/architectures.py)."""

import os
import random
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_lite.base.artefact import linear_weights
from qlora_lite.base.bnb import keep_weights_unpacked
from qlora_lite.base.published import published_weights
from qlora_lite.base.skeleton import empty_model
from qlora_lite.base.source import ARCHITECTURES, load_config
from qlora_lite.data.batches import pack_trees
from qlora_lite.device.card import CPU
from qlora_lite.evaluation.generate import generate_answers
from qlora_lite.merging import merge
from qlora_lite.model.adapter import Lora, attach_adapter, save_adapter
from qlora_lite.model.attention import packs_rows, padded_attention, why_not_shared
from qlora_lite.model.forward import causal_lm
from qlora_lite.model.head import project
from qlora_lite.model.load import checkpoint_activations, load_base
from qlora_lite.model.trained import load_trained, make_trainable, save_trained, trained_parameters
from qlora_lite.plan import MicroBatch, Settings, Stage
from qlora_lite.training.optimizer import make_optimizer
from qlora_lite.training.step import batch_loss, forward_backward
from tests.architectures import PUBLISHED, artefact, own_weights, published, widen_windows
from tests.conftest import REPOSITORY
from tests.plain_peft import compute_in_fp32
from tests.random_tree import random_tree
from tests.tiny_model import (
    gradients,
    linear4bit_layers,
    move_factors,
    random_rows,
    relative_difference,
    split_batches,
)

SHARES_NOT = {"bloom", "falcon_old", "falcon_new", "falcon_alibi", "gemma2"}  # attention of their own, or soft-capped
WINDOWS = {"mistral", "gemma3", "gemma3_text", "phi3", "starcoder2"}  # of 16 tokens here
LONG, SHORT = (24, 30), (3, 8)  # prompts beyond and within the sliding windows of 16 tokens
# transformers gives Falcon's linear layers, a subclass of nn.Linear, no 4-bit weights, so it cannot read such a base itself.
PLAIN_READS_4_BIT = [name for name in PUBLISHED if not name.startswith("falcon")]
COLUMNS = ("QLoRA", "LoRA", "full", "merge, proved", "plan", "rows")
TABLE_BEGINS, TABLE_ENDS = "<!-- made by tests/test_architectures.py -->", "<!-- end -->"
support: dict[str, dict[str, str]] = {name: {} for name in PUBLISHED}  # what the tests below have shown
every_architecture = pytest.mark.parametrize("name", list(PUBLISHED))


def plain(folder: Path, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """The model as transformers reads it, without us."""
    return AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, device_map="cpu", local_files_only=True
    ).eval()


def full_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """[T, V] by the model's own forward."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def test_the_table_has_every_architecture():
    kinds = {row.config["model_type"] for row in PUBLISHED.values()} - {"gemma3"}
    assert kinds == set(ARCHITECTURES)


@every_architecture
def test_published_keys_go_to_the_modules_that_transformers_gives_them(name):
    model = empty_model(load_config(published(name)))
    found = published_weights(published(name), model)
    row = PUBLISHED[name]
    expected = {key: tensor.to(row.dtype) for key, tensor in own_weights(name).items()}
    if row.is_tied:
        del expected["lm_head.weight"]
    assert (found.is_tied, found.num_vision) == (row.is_tied, row.num_vision)
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[key].value(), tensor) for key, tensor in expected.items())
    if name != "gemma3":  # which transformers reads as the vision model
        theirs = plain(published(name), row.dtype).state_dict()
        assert all(torch.equal(theirs[key], tensor) for key, tensor in expected.items())


@every_architecture
def test_every_linear_layer_but_the_head_is_in_4_bits(name):
    model = load_base(artefact(name), device="cpu").model
    names = {f"{layer}.weight" for layer in linear4bit_layers(model)}
    assert names == linear_weights(empty_model(load_config(artefact(name)))) and names
    assert type(model.get_output_embeddings()) is torch.nn.Linear


@every_architecture
def test_chunked_loss_of_a_packed_row_equals_the_full_logits_of_each_example(name):
    """Promise 2, and packing: value and gradient, also where the row leaves a sliding window."""
    model = attach_adapter(
        load_base(artefact(name), device="cpu", compute=torch.float32).model,
        Lora(r=4, lora_alpha=8),
        factor_dtype=torch.float32,
    )
    move_factors(model)
    rows = random_rows([3, 1, 5], prompt=LONG)
    (batch,) = split_batches(rows, 1)
    packed = batch_loss(model, batch)
    packed.backward()
    gradients = take_gradients(model)
    base = causal_lm(model)
    base.set_attn_implementation(padded_attention(type(base)))
    full = torch.zeros(())
    for index in range(len(rows)):
        example = rows.encoded(index)
        logits_NV = full_logits(model, example.input_ids)[example.predictors]
        target_N = torch.tensor([example.input_ids[i + 1] for i in example.predictors])
        full = full + torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="sum")
    full.backward()
    torch.testing.assert_close(packed, full, rtol=1e-5, atol=0)
    theirs = take_gradients(model)
    difference = sum((gradients[key] - theirs[key]).square().sum() for key in theirs)
    assert difference.sqrt() <= 2e-4 * sum(value.square().sum() for value in theirs.values()).sqrt()


@every_architecture
def test_a_packed_tree_has_the_loss_and_the_gradient_of_separate_examples(name):
    """Promise 3, where a model can share; where it cannot, it says why."""
    base = load_base(artefact(name), device="cpu", compute=torch.float32).model
    rows = random_tree(random.Random(0), depth=2, fan=3)
    longest = int(rows.lengths.max())
    why_not = [why_not_shared(type(base), base.config, length=length) for length in (longest, 16)]
    assert [why is not None for why in why_not] == [name in SHARES_NOT | WINDOWS, name in SHARES_NOT], why_not
    if why_not[1] is not None:
        return
    model = attach_adapter(base, Lora(r=4, lora_alpha=8), factor_dtype=torch.float32)
    move_factors(model)
    tree = pack_trees(rows, range(len(rows)))
    assert tree.input_ids_1T.shape[1] < rows.lengths.sum()
    if name in WINDOWS:
        with pytest.raises(ValueError, match="no dropout, window or soft cap"):
            batch_loss(model, tree)
        widen_windows(base, longest)
    alone = gradients(model, split_batches(rows, len(rows)))
    assert relative_difference(gradients(model, [tree]), alone) < 2e-5


def take_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


@every_architecture
def test_from_published_files_to_a_proved_merge_and_an_answer(name, tmp_path):
    loaded = load_base(artefact(name), device="cpu")
    model = attach_adapter(loaded.model, Lora(r=8, lora_alpha=16))
    checkpoint_activations(causal_lm(model), every=1)
    rows = random_rows([3, 6, 2, 5], prompt=SHORT)
    losses = train_until_the_loss_has_fallen(model, split_batches(rows, 2))
    assert losses[-1] < falls_to(name) * losses[0], losses

    save_adapter(model, tmp_path / "adapter", base_name=str(artefact(name)))
    ids = rows.encoded(0).input_ids
    model.eval()
    check_plain_peft(name, tmp_path / "adapter", model, ids)

    encoded = [rows.encoded(i) for i in range(len(rows))]
    result = merge(artefact(name), tmp_path / "adapter", tmp_path / "merged", encoded)
    assert result.num_merged == len(linear4bit_layers(loaded.model))
    assert result.adapter_effect > 1 and result.arithmetic_ratio < 0.01 and result.storage_ratio < 0.2

    merged, ours = (
        plain(tmp_path / "merged", torch.float32),
        load_base(tmp_path / "merged", device="cpu", compute=torch.float32),
    )
    assert causal_lm(ours.model).config.model_type == merged.config.model_type
    with torch.no_grad():
        decoder = ours.model.get_decoder()
        packing = {"lengths": (len(ids),)} if packs_rows(ours.model) else {}
        states = decoder(input_ids=torch.tensor([ids]), use_cache=False, **packing).last_hidden_state[0]
        torch.testing.assert_close(project(ours.model, states), full_logits(merged, ids), rtol=1e-4, atol=1e-3)
    prompts = [encoded[i].input_ids[: encoded[i].spans[0][0]] for i in (0, 1)]
    batched = generate_answers(ours.model, ours.tokenizer, prompts, stop_token=2, max_new_tokens=6)
    assert batched == [plain_answer(merged, ours.tokenizer, prompt) for prompt in prompts]
    settings = Settings(card=CPU, r=8, optimizer="adamw")
    planned = Stage(load_config(artefact(name)), settings).rehearse(MicroBatch(32, 2))
    assert planned.num_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned.parts["weights"] == loaded.weights_bytes
    assert planned.parts["quant_constants"] == loaded.quant_constants_bytes
    rows_of = "packed" if packs_rows(ours.model) else "one at a time"
    support[name] |= {"QLoRA": "yes", "merge, proved": "yes", "plan": "yes", "rows": rows_of}


@every_architecture
def test_lora_on_the_16_bit_base_is_merged_into_it(name, tmp_path):
    loaded = load_base(published(name), device="cpu")
    model = attach_adapter(loaded.model, Lora(r=8, lora_alpha=16))
    rows = random_rows([3, 6, 2, 5], prompt=SHORT)
    losses = train_until_the_loss_has_fallen(model, split_batches(rows, 2))
    assert losses[-1] < falls_to(name) * losses[0], losses
    save_adapter(model, tmp_path / "adapter", base_name="base")
    encoded = [rows.encoded(i) for i in range(len(rows))]
    result = merge(published(name), tmp_path / "adapter", tmp_path / "merged", encoded)
    assert result.adapter_effect > 1 and result.arithmetic_ratio < 0.01 and result.storage_ratio < 0.2
    support[name] |= {"LoRA": "yes"}


@every_architecture
def test_every_weight_can_be_trained_and_transformers_reads_them(name, tmp_path):
    loaded = load_base(published(name), device="cpu")
    make_trainable(loaded.model)
    rows = random_rows([3, 6, 2, 5], prompt=SHORT)
    losses = train_until_the_loss_has_fallen(loaded.model, split_batches(rows, 2), learning_rate=2e-3)
    assert losses[-1] < 0.8 * losses[0], losses
    save_trained(loaded.model, tmp_path, base=published(name))
    theirs = plain(tmp_path / "weights").state_dict()
    assert all(torch.equal(theirs[key], p) for key, p in loaded.model.named_parameters())
    assert load_trained(loaded.model, tmp_path).keys() == trained_parameters(loaded.model).keys()
    support[name] |= {"full": "yes"}


def test_the_support_table_of_the_models_page_is_what_these_tests_have_shown():
    if any(len(columns) < len(COLUMNS) for columns in support.values()):
        pytest.skip("only some of the architectures were run")
    page = REPOSITORY / "qlora_lite" / "docs" / "models.md"
    before, rest = page.read_text(encoding="utf-8").split(TABLE_BEGINS)
    _, after = rest.split(TABLE_ENDS)
    expected = f"{before}{TABLE_BEGINS}\n{support_table()}\n{TABLE_ENDS}{after}"
    if os.environ.get("QLORA_LITE_WRITE_TABLE"):
        page.write_text(expected, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == expected, "QLORA_LITE_WRITE_TABLE=1 writes it"


def support_table() -> str:
    """One line an architecture; `|` separated, as Markdown has it."""
    lines = [f"| architecture | published as | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, columns in support.items():
        row = PUBLISHED[name]
        kind = "gemma3_text" if row.config["model_type"] == "gemma3" else row.config["model_type"]
        cells = [ARCHITECTURES[kind], row.source, *(columns[column] for column in COLUMNS)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def falls_to(name: str) -> float:
    """Share of the first loss; Granite divides logits by 8, so that factors alone move a tiny random model more slowly."""
    return 0.9 if name == "granite" else 0.8


def train_until_the_loss_has_fallen(
    model, batches, *, share: float = 0.8, most_steps: int = 80, learning_rate: float = 1e-2
) -> list[float]:
    """Losses of as many steps as it takes to come below `share` of the first one."""
    optimizer = make_optimizer(model.named_parameters(), name="adamw", learning_rate=learning_rate, weight_decay=0.0)
    model.train()
    losses: list[float] = []
    while len(losses) < most_steps and (not losses or losses[-1] >= share * losses[0]):
        losses.append(forward_backward(model, batches))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def check_plain_peft(name: str, adapter: Path, model: PeftModel, ids: list[int]) -> None:
    """peft alone finds a place for every factor on what transformers alone reads, and computes the same logits."""
    folder = artefact(name) if name in PLAIN_READS_4_BIT else published(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of factors that are missing or left over
        warnings.filterwarnings("ignore", category=FutureWarning)
        theirs = PeftModel.from_pretrained(plain(folder), str(adapter), autocast_adapter_dtype=False).eval()
    keep_weights_unpacked(theirs)
    factors = {key: p for key, p in theirs.named_parameters() if "lora_" in key}
    saved = load_file(adapter / "adapter_model.safetensors")
    assert {key.replace(".default", ""): p.dtype for key, p in factors.items()} == {
        key: t.dtype for key, t in saved.items()
    }
    assert all(torch.equal(p, saved[key.replace(".default", "")]) for key, p in factors.items())
    if name in PLAIN_READS_4_BIT:
        base = causal_lm(model)
        base.set_attn_implementation(padded_attention(type(base)))
        for one in (model, theirs):
            compute_in_fp32(one)
        with torch.no_grad():
            torch.testing.assert_close(full_logits(model, ids), full_logits(theirs, ids), rtol=0, atol=1e-3)


def plain_answer(model, tokenizer, prompt: list[int]) -> str:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=2)
    ids = out[0, len(prompt) :].tolist()
    return tokenizer.decode(ids[: ids.index(2)] if 2 in ids else ids, skip_special_tokens=True).strip()
