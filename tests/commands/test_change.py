"""The verbs about the change itself, by the command line: rank, mix, merge --mix, ask --mix, eval --scales, rank --try."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_lite import api
from qlora_lite.errors import UserError
from qlora_lite.merging.lora import read_adapter
from qlora_lite.merging.mix import Part, mix_adapters
from qlora_lite.runs.adapters import Blend, open_source, parse_part
from qlora_lite.units import row_in_words
from tests.merging.test_spectrum import dense
from tests.tiny_run import run_cli, train_cli, write_recipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two finished runs on one base: of other seeds and ranks, one with rsLoRA."""
    folder = tmp_path_factory.mktemp("change")
    recipe = write_recipe(folder, learning_rate=1e-2)
    settings = ((), ("--set", "train.seed=1", "--set", "lora.r=4", "--set", "lora.use_rslora=true"))
    for name, words in zip("ab", settings, strict=True):
        assert train_cli(recipe, folder / name, *words).code == 0
    return folder / "a", folder / "b"


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    return {name: dense(factors) for name, factors in read_adapter(folder).factors.items()}


def test_rank_prints_every_modules_spectrum_and_an_advice_and_the_report_draws_it(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    done = run_cli("rank", run, "--json")
    found = done.json
    changes = deltas(run / "adapter")
    assert {each["module"] for each in found["modules"]} == changes.keys()
    for each in found["modules"]:
        values = torch.linalg.svdvals(changes[each["module"]])[: each["r"]]
        torch.testing.assert_close(torch.tensor(each["singular_values"][: len(values)], dtype=torch.float64), values)
    assert {kind["kind"] for kind in found["kinds"]} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert found["advice"] in done.stderr.replace("\n", " ").replace("  ", " ") or "r=" in found["advice"]
    assert "Rank of the learned change".lower() in (run / "report.html").read_text().lower()
    assert run_cli("verify", run).code == 0


def test_rank_of_two_runs_says_what_they_have_in_common(runs: tuple[Path, Path]) -> None:
    same = run_cli("rank", runs[0], "--with", runs[0], "--json").json["overlap"]
    other = run_cli("rank", runs[0], "--with", runs[1], "--json").json["overlap"]
    assert [each["k"] for each in other] == [1, 2, 4]
    assert all(each["inputs"] == pytest.approx(1) for each in same) and all(each["inputs"] < 0.9 for each in other)


def test_rank_to_writes_the_best_adapter_of_that_rank_says_what_it_costs_and_it_is_used_like_a_run(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "short"
    found = run_cli("rank", runs[0], "--to", 2, "--out", out, "--json").json["truncated"]
    assert set(found["ranks"].values()) == {2} and 0 < found["lost_share"] < 1
    assert found["num_parameters"]["after"] * 8 == found["num_parameters"]["before"]
    assert found["eval"]["before"]["loss"] != found["eval"]["after"]["loss"]
    whole, short = deltas(runs[0] / "adapter"), deltas(out)
    lost = sum((whole[n] - short[n]).square().sum() for n in whole) / sum(
        each.square().sum() for each in whole.values()
    )
    assert found["lost_share"] == pytest.approx(lost.sqrt().item(), rel=1e-4)
    assert run_cli("verify", out).code == 0
    assert run_cli("eval", out, "--json").json["loss"] == pytest.approx(found["eval"]["after"]["loss"])
    merged = run_cli("merge", out, "--json").json
    assert merged["arithmetic_ratio"] < 0.01 and Path(merged["out"]).parent == out
    assert run_cli("verify", out).code == 0


def test_rank_by_a_number_of_parameters_keeps_within_it(runs: tuple[Path, Path], tmp_path: Path) -> None:
    found = run_cli("rank", runs[0], "--parameters", 1500, "--out", tmp_path / "short", "--no-score", "--json").json[
        "truncated"
    ]
    assert 1000 < found["num_parameters"]["after"] <= 1500 and "eval" not in found
    too_few = run_cli("rank", runs[0], "--parameters", 3, "--out", tmp_path / "none")
    assert too_few.code == 2 and "too few for one direction of any module" in too_few.stderr


def test_a_mix_is_the_sum_and_plain_peft_reads_it(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "mix"
    found = run_cli("mix", f"{runs[0]}:0.7", f"{runs[1]}:-0.3", "--out", out, "--json").json
    assert found["out"] == str(out) and found["r"] == 20 and found["lost_share"] == 0
    a, b, mixed = deltas(runs[0] / "adapter"), deltas(runs[1] / "adapter"), deltas(out)
    for name in a:
        torch.testing.assert_close(mixed[name], 0.7 * a[name] - 0.3 * b[name], rtol=1e-5, atol=1e-7)
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(out), autocast_adapter_dtype=False
    )
    for name, module in theirs.base_model.model.named_modules():
        if name in mixed:
            theirs_of_it = module.get_delta_weight("default").double()
            assert (theirs_of_it - mixed[name]).norm() < 0.01 * mixed[name].norm()  # they hold the factors in bf16
    assert run_cli("merge", out, "--json").json["arithmetic_ratio"] < 0.01
    assert run_cli("ask", out, "Why?", "--which", "all", "--json").json["answers"].keys() == {
        "base",
        "adapter",
        "merged",
    }


def test_a_mix_of_a_rank_loses_what_it_says_and_a_module_may_have_its_own_weight(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    found = run_cli(
        "mix", f"{runs[0]}:0.5,down_proj=0", f"{runs[1]}:0.5", "--rank", 4, "--out", tmp_path / "mix", "--json"
    ).json
    assert found["r"] == 4 and 0 < found["lost_share"] < 1
    mixed, b = deltas(tmp_path / "mix"), deltas(runs[1] / "adapter")
    for name in (name for name in b if name.endswith("down_proj")):
        torch.testing.assert_close(mixed[name], 0.5 * b[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("text", ["a", "a:", ":1", "a:x", "a:1,=2", "a:1,q"])
def test_a_part_that_is_not_a_run_and_a_weight_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected RUN_DIR:WEIGHT"):
        parse_part(text)


def test_several_adapters_are_merged_at_once_and_asked_without_writing(runs: tuple[Path, Path], tmp_path: Path) -> None:
    parts = ["--mix", f"{runs[0]}:0.7", "--mix", f"{runs[1]}:0.3"]
    before = sorted(path.name for path in runs[0].iterdir())
    merged = run_cli("merge", runs[0], tmp_path / "out", *parts, "--json").json
    assert merged["arithmetic_ratio"] < 0.01 and (tmp_path / "out" / "model.safetensors").is_file()
    assert isinstance(run_cli("ask", runs[0], "Why?", *parts, "--json").json["answers"]["mix"], str)
    assert sorted(path.name for path in runs[0].iterdir()) == before
    assert "needs an output folder" in run_cli("merge", runs[0], *parts).stderr


def test_one_loaded_base_serves_several_adapters_as_if_each_had_been_loaded(runs: tuple[Path, Path]) -> None:
    _, plan = api.open_run(runs[0])
    adapters = {name: open_source(run).read() for name, run in zip("ab", runs, strict=True)}
    blend = Blend(plan, adapters)
    ids = torch.tensor([[5, 9, 2, 7, 30, 11]])

    def logits_of(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(ids, position_ids=torch.arange(6)[None], use_cache=False, lengths=(6,)).logits.float()

    def logits(weights: dict[str, float]) -> torch.Tensor:
        return logits_of(blend.use(weights).model)

    base = logits({})
    for weights in ({"a": 1.0}, {"b": 1.0}, {"a": 0.7, "b": 0.3}, {"a": -0.5}):
        alone = Blend(plan, {"one": mix_adapters([Part(n, adapters[n], w, {}) for n, w in weights.items()]).adapter})
        expected = logits_of(alone.use({"one": 1.0}).model)
        change = (expected - base).norm()
        assert change > 0 and (logits(weights) - expected).norm() < 0.05 * change, weights
    assert torch.equal(logits({}), base)
    with pytest.raises(UserError, match="unknown adapter"):
        blend.use({"c": 1.0})


def test_scales_are_swept_and_zero_is_the_base_and_one_the_adapter(runs: tuple[Path, Path]) -> None:
    found = run_cli("eval", runs[0], "--scales", "0,1", "--json").json
    base, adapter = (run_cli("eval", runs[0], "--which", which, "--json").json["loss"] for which in ("base", "adapter"))
    assert [line["scale"] for line in found["scales"]] == [0.0, 1.0]
    assert [line["loss"] for line in found["scales"]] == pytest.approx([base, adapter], rel=2e-3)
    assert found["best_scale"] == 1.0
    assert "expected numbers" in run_cli("eval", runs[0], "--scales", "0,x").stderr


def test_a_rank_that_no_recipe_may_have_is_refused_before_the_first_is_trained(tmp_path: Path) -> None:
    done = run_cli("rank", write_recipe(tmp_path), "--try", "1,5000")
    assert done.code == 2 and "lora.r" in done.stderr and "training" not in done.stderr, done.stderr


def zero_copy(run: Path, folder: Path, *, keep: str = "nothing") -> Path:
    """The run's adapter as peft has it, every change zero but that of modules whose names hold `keep`."""
    shutil.copytree(run / "adapter", folder)
    (folder / "manifest.json").unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    zeroed = {n: t if "lora_A" in n or keep in n else torch.zeros_like(t) for n, t in tensors.items()}
    save_file(zeroed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_adapter_that_changes_nothing_is_said_to_have_learned_nothing(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    nothing = zero_copy(runs[0], tmp_path / "nothing")
    found = run_cli("rank", nothing, "--json").json
    assert found["advice"].startswith("this adapter has learned nothing") and "99%" not in found["advice"]
    assert {kind["recommended_r"] for kind in found["kinds"]} == {0}
    assert all(kind["how_sure"].startswith("nothing was learned") for kind in found["kinds"])
    done = run_cli("rank", runs[0], "--with", nothing)
    assert done.code == 2 and "there is nothing to compare" in done.stderr


def test_only_modules_that_both_have_learned_are_compared(runs: tuple[Path, Path], tmp_path: Path) -> None:
    some = zero_copy(runs[0], tmp_path / "some", keep="down_proj")
    found = run_cli("rank", some, "--with", runs[0], "--json").json
    assert {line["num_modules"] for line in found["overlap"]} == {2}
    assert all(line["inputs"] == pytest.approx(1) for line in found["overlap"])
    assert found["advice"].startswith("r=")


def test_an_adapter_of_another_base_or_shape_is_not_compared(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("qlora_lite.runs.adapters.Source.base_sha256", property(lambda source: str(source.folder)))
        done = run_cli("rank", runs[0], "--with", runs[1])
    assert done.code == 2 and "were trained on different bases" in done.last_line, done.stderr
    narrow = zero_copy(runs[0], tmp_path / "narrow", keep="lora")
    tensors = load_file(narrow / "adapter_model.safetensors")
    cut = {name: t[:, :32].contiguous() if "lora_A" in name else t for name, t in tensors.items()}
    save_file(cut, narrow / "adapter_model.safetensors", metadata={"format": "pt"})
    done = run_cli("rank", runs[0], "--with", narrow)
    assert done.code == 2 and "they are of different models" in done.last_line, done.stderr


@pytest.mark.parametrize(("row_id", "words"), [("row 3", "row 3"), ("b.jsonl row 12", "b.jsonl row 12"), ("a7", "row a7"),
                                               ("arrow 3", "row arrow 3")])  # fmt: skip
def test_a_numbered_row_is_not_called_a_row_twice(row_id: str, words: str) -> None:
    assert row_in_words(row_id) == words


def test_trying_ranks_trains_each_and_says_which_to_take(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, max_steps=2)
    found = run_cli("rank", recipe, "--try", "1,4", "--share", 1, "--json").json
    assert [line["r"] for line in found["curve"]] == [1, 4] and all(line["num_steps"] == 2 for line in found["curve"])
    assert found["curve"][1]["adapter_bytes"] > 2 * found["curve"][0]["adapter_bytes"]
    assert found["curve"][1]["planned_peak_bytes"] > found["curve"][0]["planned_peak_bytes"]
    assert found["advice"].startswith("take r=")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("rank", "nowhere"), "neither a run nor an adapter"),
        (("rank", "{a}", "--to", "2"), "--out DIR"),
        (("rank", "{a}", "--to", "0", "--out", "x"), "above 0"),
        (("rank", "{a}", "--to", "17", "--out", "x"), "the adapter's rank is 16 and cannot be raised"),
        (
            ("rank", "{a}", "--parameters", "3", "--out", "x"),
            "too few for one direction of any module; the smallest needs 96",
        ),
        (("rank", "{a}", "--parameters", "-3", "--out", "x"), "above 0"),
        (("rank", "{a}", "--out", "x"), "needs --to R or --parameters N"),
        (("rank", "default", "--try", "1.5"), "--try: expected whole numbers above 0"),
        (("rank", "default", "--try", "1,2.0"), "got '2.0'"),
        (("rank", "default", "--try", "0,1"), "got '0'"),
        (("rank", "default", "--try", "-1"), "got '-1'"),
        (("rank", "default", "--try", "1e3"), "got '1e3'"),
        (("rank", "default", "--try", "nan"), "got 'nan'"),
        (("rank", "default", "--try", "1,,2"), "got ''"),
        (("rank", "default", "--try", "9" * 5000), "expected whole numbers"),
        (("rank", "default", "--try", "4,1,4"), "4 is given twice"),
        (("rank", "default", "--try", "4", "--to", "2"), "--to needs an existing adapter"),
        (("rank", "{a}", "--set", "lora.r=2"), "needs --try"),
        (("rank", "{a}", "--dtype", "int8"), "needs --to R or --parameters N"),
        (("mix", "{a}:0", "--out", "x"), "every weight is 0"),
        (("mix", "{a}:1", "--out", "{a}"), "already exists"),
        (("mix", "{a}:1", "--rank", "0", "--out", "x"), "--rank: expected"),
    ],
)
def test_what_cannot_be_is_one_clear_message(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_cli(*(word.replace("{a}", str(runs[0])) for word in words))
    assert done.code == 2 and expected in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_questions_from_stdin_are_answered_with_adapters_switched_between_them_on_one_loaded_base(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "Why?\n/use b:1\nWhy?\n\n/use c:1\n/use a:0.5 b:0.5\nWhy?\n/use a:0\nWhy?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    done = run_cli("ask", runs[0], "-", "--mix", f"{runs[0]}:1", "--mix", f"{runs[1]}:0", "--json")
    answers = done.json["answers"]
    assert [each["weights"] for each in answers] == [{"a": 1, "b": 0}, {"b": 1}, {"a": 0.5, "b": 0.5}, {"a": 0}]
    assert "expected /use NAME:WEIGHT ..., where NAME is one of a, b" in done.stderr.replace("\n", " ")
    assert done.stderr.count("loading the base and the adapters ...") == 1
    alone = [
        run_cli("ask", runs[0], "Why?", "--json").json["answers"]["adapter"],
        run_cli("ask", runs[1], "Why?", "--json").json["answers"]["adapter"],
        run_cli("ask", runs[0], "Why?", "--mix", f"{runs[0]}:0.5", "--mix", f"{runs[1]}:0.5", "--json").json["answers"][
            "mix"
        ],
        run_cli("ask", runs[0], "Why?", "--which", "base", "--json").json["answers"]["base"],
    ]
    assert [each["answer"] for each in answers] == alone


def test_questions_from_stdin_go_to_the_runs_own_adapter_without_a_mix(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n"))
    done = run_cli("ask", runs[0], "-", "--json")
    assert done.json["answers"][0]["weights"] == {"a": 1}
    wrong = run_cli("ask", runs[0], "-", "--which", "base")
    assert wrong.code == 2 and "--which needs the question as an argument" in wrong.stderr


def test_an_adapters_folder_inside_a_run_is_that_runs(runs: tuple[Path, Path], tmp_path: Path) -> None:
    source = open_source(runs[0] / "adapter")
    assert source.run is not None and source.run.path == runs[0] and source.folder == runs[0] / "adapter"
    shutil.copytree(runs[1], tmp_path / "other")
    (tmp_path / "other" / "manifest.json").unlink(missing_ok=True)  # the record is changed here
    env = json.loads((tmp_path / "other" / "env.json").read_text())
    (tmp_path / "other" / "env.json").write_text(json.dumps(env | {"base_sha256": "0" * 64}))
    inside = tmp_path / "other" / "adapter"
    for words in (
        ["rank", runs[0], "--with", inside],
        ["mix", f"{runs[0]}:1", f"{inside}:1", "--out", tmp_path / "sum"],
    ):
        assert "were trained on different bases" in run_cli(*words).last_line


def test_an_adapter_less_itself_has_learned_nothing(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert run_cli("mix", f"{runs[0]}:1", f"{runs[0]}:-1", "--out", tmp_path / "zero").code == 0
    assert "has learned nothing" in run_cli("rank", tmp_path / "zero", "--json").json["advice"]


def test_an_option_of_trying_ranks_goes_with_try(runs: tuple[Path, Path]) -> None:
    refused = run_cli("rank", runs[0], "--share", "0.5")
    assert refused.code == 2 and "--share" in refused.last_line and "--try" in refused.last_line


def test_a_number_of_rows_is_not_ignored_beside_a_file(runs: tuple[Path, Path]) -> None:
    refused = run_cli("eval", runs[0], "--data", "rows.jsonl", "--set", "eval.num_examples=2")
    assert refused.code == 2 and "eval.num_examples has no effect" in refused.last_line
