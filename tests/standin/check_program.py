"""The whole program on the stand-in, through its verbs: what a CUDA card would be asked, with values that the CPU's can be held against."""

import contextlib
import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite import api
from qlora_lite.commands import overheads
from qlora_lite.device.accelerator import card_here
from qlora_lite.files.cache import default_cache
from qlora_lite.memory.kept import KEPT
from qlora_lite.recipe import load_recipe
from qlora_lite.runs.folder import RunDir
from tests import standin
from tests.tiny_run import Done, run_cli, train_cli, write_recipe

standin.install()  # before the first backward pass of the process
AMPERE, TURING = "rtx-4090", "t4"
# How far losses may be from the CPU's: another order of sums in 16 bits.
CLOSE = {"bf16": 2e-3, "fp16": 2e-2, "fp32": 1e-5}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), num_scored=2, eval_every_steps=2, learning_rate=2e-3)


@contextlib.contextmanager
def seen(card: str) -> Iterator[list[torch.nn.Module]]:
    """The stand-in, and every model that is trained on it."""
    models: list[torch.nn.Module] = []
    real = api.load_model

    def load_model(*arguments: Any, **keywords: Any) -> Any:
        loaded = real(*arguments, **keywords)
        models.append(loaded.model)
        return loaded

    api.load_model = load_model
    try:
        with standin.card(card):
            yield models
    finally:
        api.load_model = real


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "steps.jsonl").read_text().splitlines()]


def plain_products(least_queries: int = 2) -> list[str]:
    """Attention that fell to plain products of more than one query."""
    return [name for name in standin.calls if name.startswith("math of") and int(name.split()[2]) >= least_queries]


SETTINGS = {
    "nf4": (AMPERE, "bf16", ()),
    "rows": (AMPERE, "bf16", ("data.share_prefixes=false", "memory.gradient_checkpointing=true")),
    "fp4": (AMPERE, "bf16", ("model.quantization=fp4", "model.double_quant=false")),
    "int8": (AMPERE, "bf16", ("model.quantization=int8",)),
    "lora": (AMPERE, "bf16", ("method=lora",)),
    "full": (AMPERE, "bf16", ("method=full",)),
    "dora": (AMPERE, "bf16", ("lora.use_dora=true",)),
    "dropout": (AMPERE, "bf16", ("lora.lora_dropout=0.1",)),
    "fp16": (TURING, "fp16", ()),
    "fp16 dora": (TURING, "fp16", ("lora.use_dora=true",)),
    "fp32": (AMPERE, "fp32", ("model.dtype=fp32",)),
    "fp32 on Turing": (TURING, "fp32", ("model.dtype=fp32",)),
    "new tokens": (AMPERE, "bf16", ('data.special_tokens=["<|yes|>"]',)),
}

# Those whose factors are scaled, mixed and shortened too: each type of factors, on a quantized base and on a plain one.
SCALED = ("nf4", "lora", "fp16", "fp32")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_verb_works_and_computes_what_the_cpu_computes(recipe: Path, tmp_path: Path, name: str) -> None:
    card, dtype, settings = SETTINGS[name]
    flags = [word for setting in settings for word in ("--set", setting)]
    run = tmp_path / "run"
    with seen(card) as models:
        trained = train_cli(recipe, run, "--json", *flags)
        assert trained.code == 0, trained.stderr
        assert "training works" not in trained.stderr and trained.json["peak_bytes"]["measured"] > 0
        assert_on_the_device(models[0], dtype)
        assert not plain_products(), standin.calls
        answers = ask(run)
        verbs(run, tmp_path, has_adapter=name != "full", is_scaled=name in SCALED)
        assert not plain_products(), standin.calls
    assert json.loads((run / "env.json").read_text())["card"].endswith("(SM 8.9)" if card == AMPERE else "(SM 7.5)")
    opened_elsewhere(run, answers)
    if name != "dropout" and dtype != "fp16":  # other random numbers; and the CPU does not train in fp16
        on_cpu = train_cli(recipe, tmp_path / "cpu", "--json", *flags)
        assert on_cpu.code == 0, on_cpu.stderr
        assert losses(run) == pytest.approx(losses(tmp_path / "cpu"), rel=CLOSE[dtype])


def assert_on_the_device(model: torch.nn.Module, dtype: str) -> None:
    devices = {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]}
    assert devices == {standin.NAME}
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    factors = {p.dtype for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}
    assert factors <= {compute if dtype == "bf16" else torch.float32}


def ask(run: Path) -> dict[str, str]:
    done = run_cli("ask", run, "What is it?", "--json")
    assert done.code == 0, done.stderr
    return done.json["answers"]


def verbs(run: Path, tmp_path: Path, *, has_adapter: bool, is_scaled: bool) -> None:
    """Everything that a finished run is asked for; `is_scaled`: its change, one of matrices alone, is scaled and mixed too."""
    done = {"eval": run_cli("eval", run, "--json"), "report": run_cli("report", run, "--json")}
    if has_adapter:
        done |= {
            "merge": run_cli("merge", run, "--json"),
            "ask": run_cli("ask", run, "What is it?", "--which", "all", "--json"),
            "rank": run_cli("rank", run, "--json"),
        }
    if is_scaled:
        done |= {
            "scales": run_cli("eval", run, "--scales", "0,1", "--json"),
            "mix": run_cli("mix", f"{run}:0.5", f"{run}:0.5", "--out", tmp_path / "mix", "--json"),
            "shorter": run_cli("rank", run, "--to", 2, "--out", tmp_path / "shorter", "--json"),
        }
    done["verify"] = run_cli("verify", run, "--json")
    for name, each in done.items():
        assert each.code == 0, f"{name}: {each.stderr}"
    assert not has_adapter or done["merge"].json["arithmetic_ratio"] < 0.01


def opened_elsewhere(run: Path, answers: dict[str, str]) -> None:
    """The run of a card is opened on a machine without one, with the types that it was trained with."""
    _, plan = api.open_run(run)
    assert plan.card.is_cpu and plan.recipe.device == "cuda" and plan.types.name == plan.recipe.model.dtype
    done = run_cli("ask", run, "What is it?", "--json")
    assert done.code == 0, done.stderr
    assert done.json["answers"].keys() == answers.keys()


@pytest.fixture(scope="module")
def stopped(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its second step of four, on the stand-in."""
    return stopped_run(recipe, tmp_path_factory.mktemp("stopped") / "run", on_card=True)


def stopped_run(recipe: Path, run: Path, *, on_card: bool) -> Path:
    with standin.card(AMPERE) if on_card else contextlib.nullcontext():
        plan = api.make_plan(load_recipe(recipe))
        steps = api.train(plan, api.load_model(plan), run, should_stop=lambda: len(RunDir(run).read_steps()) == 2)
        assert [each.step for each in steps] == [1, 2]
    return run


def go_on(recipe: Path, run: Path, *words: str) -> Done:
    done = train_cli(recipe, run, "--resume", "--json", *words)
    assert done.code == 0, done.stderr
    return done


def test_a_run_that_is_resumed_on_the_device_is_the_one_that_never_stopped(
    recipe: Path, stopped: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    with standin.card(AMPERE):
        whole = train_cli(recipe, tmp_path / "whole", "--json")
        go_on(recipe, run)
    assert whole.code == 0 and losses(run) == losses(tmp_path / "whole")
    factors = [(path / "adapter" / "adapter_model.safetensors").read_bytes() for path in (run, tmp_path / "whole")]
    assert factors[0] == factors[1]


def test_a_run_goes_on_without_the_card_that_it_was_begun_on(recipe: Path, stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    done = go_on(recipe, run)
    assert "the device was NVIDIA GeForce RTX 4090 (SM 8.9), is CPU now" in done.stderr
    assert "the run began on cuda" in done.stderr and len(losses(run)) == 4
    whole = train_cli(recipe, tmp_path / "whole", "--json")
    assert whole.code == 0 and losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=CLOSE["bf16"])


def test_a_run_goes_on_with_a_card_that_it_was_begun_without(recipe: Path, tmp_path: Path) -> None:
    run = stopped_run(recipe, tmp_path / "run", on_card=False)
    with standin.card(AMPERE):
        done = go_on(recipe, run)
    assert "the device was CPU, is NVIDIA GeForce RTX 4090 (SM 8.9) now" in done.stderr and len(losses(run)) == 4


def test_a_run_may_be_taken_to_the_processor_by_asking_for_it(recipe: Path, stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    with standin.card(AMPERE):
        done = go_on(recipe, run, "--set", "device=cpu")
    assert "is CPU now" in done.stderr


def test_memory_that_runs_out_in_the_whole_program_makes_it_leaner_and_the_run_says_so(
    recipe: Path, tmp_path: Path
) -> None:
    words = ("--set", "memory.budget=24GiB", "--set", "data.share_prefixes=false", "--json")
    with standin.card(AMPERE):
        whole = train_cli(recipe, tmp_path / "whole", *words)
    assert whole.code == 0, whole.stderr
    allocator = json.loads((tmp_path / "whole" / "memory.json").read_text())
    with standin.card(
        AMPERE, memory_bytes=round(0.85 * allocator["peak_bytes"]["measured"]) + torch.standin.memory_allocated()
    ):
        lean = train_cli(recipe, tmp_path / "lean", *words)
    assert lean.code == 0, lean.stderr
    assert "out of memory (CUDA out of memory" in lean.stderr
    kept = json.loads((tmp_path / "lean" / "memory.json").read_text())
    assert kept["retries"] and kept["allocator"]["num_out_of_memory"] > 0
    assert losses(tmp_path / "lean") == pytest.approx(losses(tmp_path / "whole"), rel=CLOSE["bf16"])


def test_a_step_waits_for_the_device_once_a_micro_batch_and_once_for_the_norm(recipe: Path, tmp_path: Path) -> None:
    with standin.card(AMPERE):
        plan = api.make_plan(
            load_recipe(recipe, overrides=["train.eval_every_steps=null", "train.save_every_steps=50"])
        )
        steps = api.train(plan, api.load_model(plan), tmp_path / "run")
        first, before = next(steps), standin.num_synchronized()
        second = next(steps)
        waited = standin.num_synchronized() - before
        steps.close()
    assert first.step == 1 and waited == second.num_micro_batches + 1


def test_trying_ranks_trains_each_on_the_device(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with standin.card(AMPERE):
        done = run_cli("rank", recipe, "--try", "1,2", "--share", "1", "--json", "--set", "train.max_steps=2")
    assert done.code == 0, done.stderr


def test_a_plan_for_the_card_that_is_here_takes_its_memory_and_types(recipe: Path) -> None:
    for card, dtype in ((AMPERE, "bf16"), (TURING, "fp16")):
        with standin.card(card):
            plan = api.make_plan(load_recipe(recipe))
            assert plan.card == card_here() and plan.types.name == dtype and plan.device == standin.NAME
            assert plan.recipe.device == "cuda"
            free = torch.standin.mem_get_info()[0]
            assert 0.9 * free < plan.budget_bytes < free


def test_what_an_earlier_run_left_to_the_garbage_collector_is_not_taken_off_the_budget(recipe: Path) -> None:
    """A trained model hangs in cycles: a second plan in the same process must not count it as used."""
    with standin.card(AMPERE):
        empty = api.make_plan(load_recipe(recipe)).budget_bytes
        cycle: list[object] = [torch.empty(2**30, dtype=torch.uint8, device=standin.NAME)]
        cycle.append(cycle)
        gc.disable()
        try:
            del cycle
            assert api.make_plan(load_recipe(recipe)).budget_bytes == empty
        finally:
            gc.enable()


def test_two_cards_in_one_process_and_the_cpu_after_them(recipe: Path, tmp_path: Path) -> None:
    """accelerate keeps one state a process; a rehearsal or another run must not meet the wrong one."""
    for index, card in enumerate((AMPERE, None, TURING)):
        with standin.card(card) if card else contextlib.nullcontext():
            done = train_cli(recipe, tmp_path / f"run-{index}", "--json", "--set", "train.max_steps=1")
        assert done.code == 0, done.stderr


def test_a_timeline_is_recorded_on_the_device(recipe: Path, tmp_path: Path) -> None:
    with standin.card(AMPERE):
        done = train_cli(recipe, tmp_path / "run", "--json", "--profile")
    assert done.code == 0, done.stderr
    kinds = {path.suffix for path in (tmp_path / "run" / "profile").iterdir()}
    assert kinds == {".gz", ".pickle"}


def test_what_doctor_measures_on_a_card_is_taken_by_plans_for_it(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holes by bytes and not by a share of the card; rows of many lengths; weights that do not all lie in the card's cache."""
    monkeypatch.setattr(overheads, "SMALL_CARD_MODEL", ("smollm2-135m", 1))
    monkeypatch.setattr(overheads, "CARD_LENGTHS", (16, 32, 48, 64))
    with standin.card("rtx-3080"):
        measured = overheads.measure_card(standin.NAME)
        assert measured["card"] == card_here().name and measured["fragmentation_bytes"] >= 0
        assert measured["step_allocated_bytes"] > 2**20
        price = overheads.dequantize_price(standin.NAME, num_rounds=1, shape=(512, 1024), num_tokens=(4,))
        assert price["dequantize_s"]["median"] > 0
        kept = {**measured, "fragmentation_bytes": 2**30, "cublas_workspace_bytes": 2**20, "versions": {}}
        default_cache().mkdir(parents=True, exist_ok=True)
        (default_cache() / KEPT).write_text(json.dumps(kept))
        plan = api.make_plan(load_recipe(recipe))
        assert plan.budget_bytes == torch.standin.mem_get_info()[0] - 2**30
        assert plan.chosen.settings.runtime_bytes == 2 * 2**20


def test_memory_that_runs_out_elsewhere_is_one_message_and_exit_code_3(recipe: Path, tmp_path: Path) -> None:
    with standin.card(AMPERE):
        assert train_cli(recipe, tmp_path / "run", "--json", "--set", "train.max_steps=1").code == 0
    for words in (("ask", tmp_path / "run", "What is it?"), ("eval", tmp_path / "run"), ("merge", tmp_path / "run")):
        with standin.card(AMPERE, memory_bytes=torch.standin.memory_allocated() + 100_000):
            done = run_cli(*words)
        assert done.code == 3 and "Traceback" not in done.stderr, done.stderr
        assert "out of memory (CUDA out of memory. Tried to allocate" in done.last_line, done.last_line
    assert not (tmp_path / "run" / "merged").exists()
