"""Factors in 8 bits: what they lose, what is refused, and that every reader takes them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_lite.errors import ModelError
from qlora_lite.merging.lora import read_adapter
from qlora_lite.model.int8_factors import INT8_FILE, from_int8, to_int8
from tests.merging.test_spectrum import dense
from tests.tiny_run import run_cli, train_cli, write_recipe

A, B = "base_model.model.m.lora_A.weight", "base_model.model.m.lora_B.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    assert train_cli(write_recipe(folder, learning_rate=1e-2), folder / "run").code == 0
    return folder / "run"


def factors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {A: torch.randn(4, 200) * torch.tensor([[1.0], [1e-6], [1e3], [0.0]]), B: torch.randn(70, 4) * 1e-3}


def test_each_value_is_within_half_a_step_of_its_own_block_and_direction() -> None:
    before = factors()
    stored = to_int8(before)
    after = from_int8(stored)
    assert stored[A].dtype == stored[B].dtype == torch.int8
    assert stored[f"{A}.step"].shape == (4, 4) and stored[f"{B}.step"].shape == (4, 2)
    for row in range(4):
        for start in range(0, 200, 64):
            block = before[A][row, start : start + 64]
            error = (after[A][row, start : start + 64] - block).abs().max()
            assert error <= block.abs().max() / 254 * 1.0001
    for column in range(4):
        for start in (0, 64):
            block = before[B][start : start + 64, column]
            assert (after[B][start : start + 64, column] - block).abs().max() <= block.abs().max() / 254 * 1.0001
    relative = (after[B] - before[B]).norm() / before[B].norm()
    assert 0.003 < relative < 0.008  # the docstring's 0.6%


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop(f"{A}.step"),
        lambda t: t.update({A: t[A].float()}),
        lambda t: t.update({f"{A}.step": t[f"{A}.step"][:, :1].clone()}),
        lambda t: t.update({f"{B}.step": t[f"{B}.step"] * float("nan")}),
        lambda t: t.update({A: t[A].flatten()}),
        lambda t: t.update({"other.step": torch.ones(2)}),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(damage, run: Path, tmp_path: Path) -> None:
    stored = to_int8(factors())
    damage(stored)
    with pytest.raises(ValueError, match=r"lora_|other"):
        from_int8(stored)
    shutil.copy(run / "adapter" / "adapter_config.json", tmp_path)
    save_file(stored, tmp_path / INT8_FILE)
    with pytest.raises(ModelError, match=r"expected|not finite"):
        read_adapter(tmp_path)


def test_an_adapter_in_8_bits_is_asked_scored_merged_mixed_and_verified_like_any_other(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    found = run_cli("rank", run, "--to", 16, "--dtype", "int8", "--out", out, "--json").json["truncated"]
    assert (out / INT8_FILE).is_file() and not (out / "adapter_model.safetensors").exists()
    assert found["adapter_bytes"]["after"] == (out / INT8_FILE).stat().st_size
    assert found["lost_share"] < 1e-9 and 0 < found["proof"]["lost_share"] < 0.05
    exact, stored = (
        {name: dense(each) for name, each in read_adapter(folder).factors.items()} for folder in (run / "adapter", out)
    )
    for name, change in exact.items():
        assert 0 < (stored[name] - change).norm() < 0.02 * change.norm()
    assert run_cli("eval", out, "--json").json["loss"] == pytest.approx(found["eval"]["after"]["loss"])
    assert run_cli("ask", out, "Why?", "--json").code == 0
    assert run_cli("merge", out, "--json").json["arithmetic_ratio"] < 0.01
    assert run_cli("mix", f"{out}:0.5", f"{run}:0.5", "--out", tmp_path / "mix", "--json").json["lost_share"] == 0
    assert run_cli("verify", out).code == 0


def test_a_mix_says_how_much_of_its_effect_a_type_loses(run: Path, tmp_path: Path) -> None:
    lost = {
        dtype: run_cli("mix", f"{run}:0.7", "--out", tmp_path / dtype, "--dtype", dtype, "--json").json["proof"]
        for dtype in ("bf16", "int8")
    }
    assert 0 < lost["bf16"]["lost_share"] < lost["int8"]["lost_share"] < 0.05
    assert "proof" not in run_cli("mix", f"{run}:0.7", "--out", tmp_path / "fp32", "--json").json
    wrong = run_cli("mix", f"{run}:0.5", "--out", tmp_path / "wrong", "--dtype", "int4")
    assert wrong.code == 2 and "--dtype: expected one of fp32, bf16, int8" in wrong.stderr
    assert not (tmp_path / "wrong").exists()


def test_plain_peft_finds_no_adapter_there_instead_of_reading_another_one(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert run_cli("mix", f"{run}:1", "--out", out, "--dtype", "int8", "--no-score").code == 0
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    with pytest.raises((OSError, ValueError)):  # peft takes the folder for a name of the hub
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out))


def test_training_may_start_from_an_adapter_in_8_bits(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "start"
    assert run_cli("mix", f"{run}:1", "--out", out, "--dtype", "int8", "--no-score").code == 0
    recipe = write_recipe(tmp_path, learning_rate=1e-2)
    again = train_cli(recipe, tmp_path / "again", "--set", f"lora.init_from={out}", "--set", "lora.lora_alpha=16")
    assert again.code == 0, again.stderr
    assert load_file(tmp_path / "again" / "adapter" / "adapter_model.safetensors")
