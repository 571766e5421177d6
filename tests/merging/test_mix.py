"""Adapters added up: against dense arithmetic, and against peft where peft is right."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qlora_lite.errors import ModelError
from qlora_lite.files.manifest import verify_manifest
from qlora_lite.merging.lora import Adapter, LoraFactors, read_adapter
from qlora_lite.merging.mix import Part, mix_adapters, write_adapter
from tests.merging.test_lora import Block
from tests.merging.test_spectrum import dense, random_factors


def part(
    name: str,
    shapes: dict[str, tuple[int, int]],
    r: int,
    *,
    weight: float,
    seed: int,
    scaling: float = 0.5,
    **weights: float,
) -> Part:
    factors = {n: random_factors(s, r, seed=seed + i, scaling=scaling) for i, (n, s) in enumerate(shapes.items())}
    return Part(name, Adapter(factors, {}, {}), weight, weights)


SHAPES = {"layers.0.q_proj": (12, 20), "layers.0.up_proj": (30, 12)}


def test_a_mix_is_the_weighted_sum_of_the_dense_changes_with_other_ranks_scalings_modules_and_signs() -> None:
    parts = [
        part("a", SHAPES, 3, weight=0.7, seed=0),
        part("b", SHAPES, 5, weight=-0.4, seed=10, scaling=2.0),
        part("c", {"layers.0.q_proj": (12, 20)}, 2, weight=1.5, seed=20, scaling=4 / 2**0.5),
    ]
    mix = mix_adapters(parts)
    for module in SHAPES:
        of_parts = [p.weight * dense(p.adapter.factors[module]) for p in parts if module in p.adapter.factors]
        torch.testing.assert_close(dense(mix.adapter.factors[module]), sum(of_parts), rtol=1e-6, atol=1e-6)
    assert mix.r == 10 and mix.lost_share == 0.0
    assert {n: f.a_RI.shape[0] for n, f in mix.adapter.factors.items()} == {
        "layers.0.q_proj": 10,
        "layers.0.up_proj": 8,
    }


def test_brought_to_a_rank_the_mix_loses_what_it_says() -> None:
    parts = [part("a", SHAPES, 3, weight=0.5, seed=0), part("b", SHAPES, 4, weight=0.5, seed=10)]
    exact, short = mix_adapters(parts), mix_adapters(parts, rank=4)
    whole = sum(dense(f).square().sum() for f in exact.adapter.factors.values())
    lost = sum((dense(f) - dense(short.adapter.factors[n])).square().sum() for n, f in exact.adapter.factors.items())
    assert short.r == 4 and short.lost_share == pytest.approx((lost / whole).sqrt().item(), rel=1e-5)


def test_an_adapter_taken_away_from_itself_leaves_nothing() -> None:
    one = part("a", SHAPES, 3, weight=1.0, seed=0)
    gone = mix_adapters([one, Part("again", one.adapter, -1.0, {})])
    assert all(dense(factors).abs().max() < 1e-6 for factors in gone.adapter.factors.values())


def test_modules_may_have_weights_of_their_own() -> None:
    one = part("a", SHAPES, 3, weight=1.0, seed=0, up_proj=0.25, q_proj=0.0)
    mix = mix_adapters([one])
    assert mix.adapter.factors.keys() == {"layers.0.up_proj"}
    expected = 0.25 * dense(one.adapter.factors["layers.0.up_proj"])
    torch.testing.assert_close(dense(mix.adapter.factors["layers.0.up_proj"]), expected)


def test_all_that_is_no_sum_is_refused_by_name_at_once() -> None:
    dora = LoraFactors(torch.ones(2, 20), torch.ones(12, 2), 1.0, torch.ones(12))
    parts = [
        Part("dora", Adapter({"layers.0.q_proj": dora}, {}, {}), 1.0, {}),
        Part("whole", Adapter({}, {"model.norm.weight": torch.ones(3)}, {}), 1.0, {}),
        part("typo", SHAPES, 2, weight=1.0, seed=0, qproj=2.0),
        part("other", {"layers.0.q_proj": (12, 21)}, 2, weight=1.0, seed=0),
    ]
    with pytest.raises(ModelError) as caught:
        mix_adapters(parts)
    for expected in (
        "dora: DoRA",
        "whole: model.norm.weight was trained whole",
        "typo: qproj is not a module",
        "[12, 20] and [12, 21]",
    ):
        assert expected in str(caught.value)


def test_what_is_written_is_read_back_as_it_was_with_a_rank_for_each_module(tmp_path: Path) -> None:
    mix = mix_adapters(
        [part("a", SHAPES, 3, weight=0.7, seed=0), part("b", {"layers.0.q_proj": (12, 20)}, 5, weight=1, seed=9)]
    )
    write_adapter(mix.adapter, tmp_path / "out", base_name="base", made_of={"a": 0.7}, texts={"note.txt": "x"})
    again = read_adapter(tmp_path / "out")
    for name, factors in mix.adapter.factors.items():
        assert torch.equal(dense(again.factors[name]), dense(factors))
    assert verify_manifest(tmp_path / "out") == [] and (tmp_path / "out" / "note.txt").exists()


NAMES = ("first", "second")


def peft_sum(tmp_path: Path, how: str, **settings: object) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """0.7 a + 0.3 b: as peft has it by `how`, and as the dense changes add up."""
    torch.manual_seed(0)
    configs = {
        n: LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **settings)
        for n in NAMES
    }
    model = get_peft_model(Block(), configs[NAMES[0]], adapter_name=NAMES[0])
    model.add_adapter(NAMES[1], configs[NAMES[1]])
    model.save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(list(NAMES), [0.7, 0.3], "mix", combination_type=how)
    modules = {name: model.base_model.model.get_submodule(name) for name in ("q_proj", "up_proj")}
    theirs = {name: module.get_delta_weight("mix").detach() for name, module in modules.items()}
    right = {
        n: (0.7 * m.get_delta_weight(NAMES[0]) + 0.3 * m.get_delta_weight(NAMES[1])).detach()
        for n, m in modules.items()
    }
    parts = [Part(n, read_adapter(tmp_path / n), w, {}) for n, w in zip(NAMES, (0.7, 0.3), strict=True)]
    ours = mix_adapters(parts).adapter.factors
    for name, expected in right.items():
        torch.testing.assert_close(dense(ours[name]).float(), expected, rtol=1e-4, atol=1e-5)
    return theirs, right


def test_peft_is_right_when_it_puts_plain_factors_beside_each_other(tmp_path: Path) -> None:
    theirs, right = peft_sum(tmp_path, "cat")
    for name, expected in right.items():
        torch.testing.assert_close(theirs[name], expected, rtol=1e-4, atol=1e-5)


def test_pefts_linear_combination_is_another_change_than_the_sum(tmp_path: Path) -> None:
    theirs, right = peft_sum(tmp_path, "linear")
    assert all((theirs[name] - right[name]).norm() > 0.3 * right[name].norm() for name in right)


def test_with_rslora_pefts_sum_is_too_large(tmp_path: Path) -> None:
    theirs, right = peft_sum(tmp_path, "cat", use_rslora=True)
    for name, expected in right.items():
        torch.testing.assert_close(theirs[name], 8**0.5 * expected, rtol=1e-4, atol=1e-4)  # the mix has rank 8
