"""Cards by name, what each can do, and how a plan for one differs from that for another."""

from dataclasses import replace

import pytest
import torch

from qlora_lite.base.known import known_config
from qlora_lite.device.card import CPU, Card, card_named, name_of, with_rates
from qlora_lite.device.known_cards import KNOWN_CARDS
from qlora_lite.errors import UserError
from qlora_lite.model.dtypes import choose_types
from qlora_lite.plan.rehearsal import MicroBatch, Settings, Stage
from qlora_lite.plan.strategy import dequantizing_tokens
from qlora_lite.recipe import DEFAULT_RECIPE
from tests.tiny_run import run_cli

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FIVE = ("gtx-1080-ti", "t4", "a100-80gb", "rtx-4090", "h100")  # 6.1, 7.5, 8.0, 8.9, 9.0


def test_the_table_has_the_cards_that_people_own_and_every_row_is_whole():
    assert len(KNOWN_CARDS) >= 25
    assert {
        "gtx-1080-ti",
        "rtx-3060",
        "rtx-3090",
        "rtx-4090",
        "rtx-5090",
        "t4",
        "a10",
        "l4",
        "l40s",
        "h200",
    } <= KNOWN_CARDS.keys()
    for short, row in KNOWN_CARDS.items():
        card = card_named(short)
        assert card.name == row.full_name and name_of(card) == short and card.capability == row.capability
        assert 0.9 * row.memory_gib < card.memory_bytes / 2**30 < row.memory_gib
        assert 2**32 < card.memory_bytes < 2**38 and 10 < card.num_sms < 200
        assert 1e12 < card.flops < 2e15 and 1e11 < card.bytes_per_s < 1e13 and 0 < card.power_w < 1000
    assert len({row.capability for row in KNOWN_CARDS.values()}) >= 6


@pytest.mark.parametrize(
    ("name", "short"),
    [
        *((name, "rtx-4070") for name in ("RTX 4070", "rtx_4070", "rtx4070", "4070", "NVIDIA GeForce RTX 4070")),
        ("GeForce RTX 3060", "rtx-3060"),
        ("Tesla T4", "t4"),
        ("T4", "t4"),
        ("titan", "titan-rtx"),
        ("p100", "p100"),
    ],
)
def test_a_card_is_found_as_people_write_it(name, short):
    assert name_of(card_named(name)) == short


def test_a_name_of_several_cards_gets_them_all():
    with pytest.raises(UserError, match=r"did you mean a100-40gb, a100-80gb\?"):
        card_named("a100")


def test_an_unknown_card_gets_the_nearest_ones():
    with pytest.raises(
        UserError, match=r"--card: 'rtx-4099' does not name exactly one card of the table; did you mean .*rtx-4090"
    ):
        card_named("rtx-4099")
    with pytest.raises(UserError, match=r"`plan --cards` lists all \d+"):
        card_named("abacus")
    with pytest.raises(UserError, match="does not name exactly one card"):
        card_named("")


@pytest.mark.parametrize(
    ("card", "dtype", "width", "value_width", "has_mask", "trains", "kernel"),
    [
        ("rtx-4090", BF16, 128, 128, False, True, "flash"),
        ("rtx-4090", FP16, 60, 60, False, True, "flash"),
        ("rtx-4090", BF16, 128, 128, True, True, "efficient"),
        ("rtx-4090", FP32, 128, 128, False, True, "efficient"),
        ("rtx-4090", BF16, 200, 200, False, True, "efficient"),
        ("rtx-4090", BF16, 200, 200, False, False, "flash"),
        ("rtx-4090", BF16, 256, 256, False, True, "flash"),
        ("a100-80gb", BF16, 200, 200, False, True, "flash"),
        ("h100", BF16, 264, 264, False, True, "efficient"),
        ("h100", BF16, 192, 128, False, True, "efficient"),
        ("t4", FP16, 128, 128, False, True, "efficient"),
        ("t4", BF16, 128, 128, False, True, "plain"),
        ("gtx-1080-ti", FP32, 128, 128, False, True, "efficient"),
        (None, BF16, 128, 128, False, True, "cpu flash"),
        (None, BF16, 192, 128, False, True, "plain"),
    ],
)
def test_the_kernel_of_attention_is_torchs_rule(card, dtype, width, value_width, has_mask, trains, kernel):
    device = CPU if card is None else card_named(card)
    assert device.attention_kernel(dtype, width, value_width, has_mask=has_mask, trains=trains) == kernel


def test_one_model_is_planned_differently_for_five_capabilities():
    """Types, kernels, libraries' memory and rounding are the card's; how fast dequantizing is beside a product as well."""
    config = known_config("llama-3.2-1b")
    config.num_hidden_layers = 2
    found = {}
    for name in FIVE:
        card = card_named(name)
        types = choose_types("auto", card)
        settings = Settings(card=card, compute=types.compute, factors=types.factors)
        found[name] = types.name, Stage(config, settings).rehearse(MicroBatch(2048, 2))
    assert {name: dtype for name, (dtype, _) in found.items()} == {
        "gtx-1080-ti": "fp16", "t4": "fp16", "a100-80gb": "bf16", "rtx-4090": "bf16", "h100": "bf16",
    }  # fmt: skip
    runtime = {name: each.parts["runtime"] for name, (_, each) in found.items()}
    assert runtime["h100"] == 2 * 32 * 2**20 and runtime["rtx-4090"] == runtime["t4"] == 2 * 8_519_680
    # fp32 factors; keys and values for every query head, and no FlashAttention, where there are no bf16 and no Ampere
    assert found["t4"][1].parts["adapter"] == 2 * found["rtx-4090"][1].parts["adapter"]
    assert found["t4"][1].phases["backward"] != found["rtx-4090"][1].phases["backward"]
    assert found["t4"][1].peak_bytes == found["gtx-1080-ti"][1].peak_bytes  # the same types and kernels
    same = {
        sum(found[name][1].phases["backward"].values()) - runtime[name] for name in ("a100-80gb", "rtx-4090", "h100")
    }
    assert len(same) == 1
    tokens = {name: dequantizing_tokens(card_named(name), "qlora") for name in FIVE}
    assert 50 < tokens["gtx-1080-ti"] < tokens["a100-80gb"] < tokens["rtx-4090"] < tokens["h100"]


def test_memory_of_plain_attention_grows_with_the_square_of_the_length_and_no_card_takes_it():
    config = known_config("smollm2-135m")
    config.num_hidden_layers = 2
    for name, dtype in (("t4", FP16), ("t4", FP32), ("rtx-4090", FP32), ("rtx-4090", BF16)):
        card = card_named(name)
        settings = Settings(card=card, compute=dtype, factors=FP32 if dtype != BF16 else BF16, runtime_bytes=0)
        stage = Stage(config, settings)
        peaks = [stage.rehearse(MicroBatch(length, 1, 16 / length)).peak_bytes for length in (4096, 8192, 16384)]
        assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.02), name


def test_a_card_that_is_here_and_not_in_the_table_has_the_rates_of_the_slowest_of_its_kind():
    unknown = Card("NVIDIA GeForce RTX 4321", "cuda", 10 * 2**30, (8, 9))
    assert with_rates(unknown).flops > 0 and "assumed, those of" in with_rates(unknown).source
    known = replace(card_named("rtx-4090"), flops=0.0, bytes_per_s=0.0)
    assert with_rates(known).flops == card_named("rtx-4090").flops
    newer = with_rates(Card("NVIDIA B200", "cuda", 180 * 2**30, (10, 0)))
    assert newer.flops == card_named("h100").flops and "those of NVIDIA H100" in newer.source


def test_plan_for_a_card_says_what_it_takes_off_and_why():
    done = run_cli("plan", DEFAULT_RECIPE, "--card", "t4", "--json", "--set", "model.base=llama-3.2-1b")
    assert done.code == 0, done.stderr
    plan, reasons = done.json, "\n".join(done.json["reasons"])
    reported = card_named("t4").memory_bytes
    assert plan["card"] == "t4" and plan["budget_bytes"] == reported - 500 * 2**20 - int(0.03 * reported)
    assert reported == int(14.56 * 2**30)  # of 16: ECC takes its share
    assert (
        "device: Tesla T4 (SM 7.5): asked for" in reasons
        and "fp16: the card (Tesla T4 (SM 7.5)) has no bf16" in reasons
    )
    assert "less 500 MiB for its context" in reasons and "--card overrides the recipe's 512 MiB" in reasons


def test_cards_are_listed():
    done = run_cli("plan", "--cards", "--json")
    assert done.code == 0 and [card["name"] for card in done.json["cards"]] == list(KNOWN_CARDS)
    by_name = {card["name"]: card for card in done.json["cards"]}
    assert by_name["t4"]["dtype"] == "fp16" and by_name["t4"]["attention"] == "efficient"
    assert by_name["rtx-4090"]["compute_capability"] == "8.9" and by_name["rtx-4090"]["attention"] == "flash"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--card", "rtx-4099"), "rtx-4090"),
        (("--budget", "0"), "expected a size above 0, such as 24GiB, got 0"),
        (("--card", "t4", "--set", "device=cpu"), "the recipe has device: cpu"),
        (("--card", "t4", "--set", "model.dtype=bf16"), "has no bf16. Use model.dtype: auto, fp16 or fp32"),
        (("--card", "t4", "--set", "method=full"), "Use model.dtype: fp32"),
    ],
)
def test_what_a_card_cannot_do_is_said(words, message):
    done = run_cli("plan", "llama-3.2-1b", *words)
    assert done.code == 2 and message in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("16", 16 * 2**30), ("7.5", 15 * 2**29), ("16GiB", 16 * 2**30), ("34359738368", 32 * 2**30)]
)
def test_a_plain_number_of_a_budget_is_gib_as_cards_are_sold(text, num_bytes):
    from qlora_lite.recipe import load_recipe
    from qlora_lite.units import parse_budget

    assert parse_budget(text) == num_bytes
    assert load_recipe(DEFAULT_RECIPE, overrides=[f"memory.budget={text}"]).memory.budget == num_bytes
