"""The command line as a user meets it: every verb on a tiny model, being stopped, and what goes wrong with one clear message."""

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from qlora_lite.commands.stopping import resume_command
from qlora_lite.recipe import load_recipe
from qlora_lite.recipe.schema import ON_DEVICE
from qlora_lite.runs.folder import RunDir
from qlora_lite.training import newest_valid, state, step
from tests.tiny_model import tiny_source
from tests.tiny_run import NUM_STEPS, Done, run_cli, train_cli, write_recipe

SIGNAL_STEPS = 24  # steps of the runs that are stopped by a signal: enough that it comes in the middle


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that these tests share, for what runs before a test's own is set."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("shared-home")
        patch.setenv("QLORA_LITE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def trained(home: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A finished run that is not changed, and how its `train --json` ended."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    return run, train_cli(recipe, run, "--json")


@pytest.fixture(scope="module")
def merged(trained: tuple[Path, Done], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A copy of it that was merged, and how its `merge --json` ended."""
    run = copy_run(trained[0], tmp_path_factory.mktemp("merged") / "run")
    return run, run_cli("merge", run, "--json")


@pytest.fixture(autouse=True)
def shared_home(own_home: None, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_LITE_HOME", str(home))


def copy_run(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def refused(done: Done, *words: str) -> str:
    """The one message of a command that the user can mend."""
    assert done.code == 2, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    for word in words:
        assert word in done.last_line, done.stderr
        assert done.stderr.count(done.last_line) == 1
    return done.last_line


def step_numbers(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "steps.jsonl").read_text().splitlines()]


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def left_over(folder: Path) -> list[str]:
    """Staging folders and temporary files below `folder`."""
    return [str(path) for path in folder.rglob("*") if path.name.startswith(".")]


# train


def test_train_prints_one_document_with_what_the_contract_names(trained: tuple[Path, Done]) -> None:
    run, done = trained
    summary = done.json
    assert summary["run_dir"] == str(run)
    assert summary["num_steps"] == NUM_STEPS
    for key in ("train_s", "wall_s", "examples_per_s", "label_tokens_per_s", "rss_bytes"):
        assert summary[key] > 0, key
    assert summary["train_s"] < summary["wall_s"]
    assert summary["peak_bytes"]["planned"] > 0 and summary["peak_bytes"]["measured"] > 0
    for when in ("before", "after"):
        scores = summary["eval"][when]
        assert 0 <= scores["exact_match"] <= scores["f1"] <= 100 and scores["loss"] > 0 and scores["num_examples"] == 4
    assert summary["eval"]["before"]["loss"] != summary["eval"]["after"]["loss"]


def test_the_run_directory_holds_what_the_contract_names(trained: tuple[Path, Done], recipe: Path) -> None:
    run, done = trained
    files = {path.name for path in run.iterdir()}
    assert files >= {
        "recipe.yaml", "plan.json", "env.json", "steps.jsonl", "memory.json", "eval.json", "predictions.jsonl", "checkpoints",
        "adapter", "report.html",
    }  # fmt: skip
    assert left_over(run) == []
    assert step_numbers(run) == list(range(1, NUM_STEPS + 1))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert json.loads((run / "eval.json").read_text())["before"] == done.json["eval"]["before"]
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 4
    assert "auto" not in load_recipe(run / "recipe.yaml").data.model_dump().values()


def test_the_numbers_of_the_summary_are_those_of_the_steps(trained: tuple[Path, Done]) -> None:
    run, done = trained
    steps = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    assert done.json["train_s"] == pytest.approx(sum(step["step_s"] for step in steps))
    assert done.json["examples_per_s"] == pytest.approx(4 * NUM_STEPS / done.json["train_s"])
    assert done.json["rss_bytes"] == max(step["rss_bytes"] for step in steps)


def test_memory_json_holds_planned_beside_measured_by_part_and_phase(trained: tuple[Path, Done]) -> None:
    memory = json.loads((trained[0] / "memory.json").read_text())
    planned = json.loads((trained[0] / "plan.json").read_text())["methods"]["qlora"]
    for part, line in memory["parts"].items():
        assert line["planned"] == planned["parts"][part] and line["difference"] == line["measured"] - line["planned"]
    assert sum(line["measured"] for line in memory["parts"].values()) == memory["peak_bytes"]["measured"]
    assert all(
        memory["parts"][f"{part}_bytes"]["difference"] == 0 for part in ("weights", "quant_constants", "adapter")
    )
    measured = {phase: line["measured"] for phase, line in memory["phases"].items() if phase != "evaluate"}
    assert measured.keys() == {"forward", "head", "backward", "update"}
    assert max(measured.values()) == memory["peak_bytes"]["measured"]
    assert [moment["layer"] for moment in memory["timeline"]] == ["0", "1", "head", "1", "0", "embedding"]


def test_how_a_step_is_computed_does_not_change_what_is_learned(
    trained: tuple[Path, Done], recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "lean"
    lean = ("memory.gradient_checkpointing=2", "memory.head_chunk=16", "memory.eval_batch_tokens=100")
    done = train_cli(recipe, run, *(word for setting in lean for word in ("--set", setting)), "--json").json
    settings = json.loads((run / "plan.json").read_text())["settings"]
    chosen = {"gradient_checkpointing": 2, "head_chunk": 16, "eval_batch_tokens": 100}
    assert settings["memory"] == {"budget": "auto", "host_budget": "auto", **chosen, **ON_DEVICE}
    assert done["eval"]["after"]["loss"] == pytest.approx(trained[1].json["eval"]["after"]["loss"], rel=1e-3)
    assert done["peak_bytes"]["planned"] < trained[1].json["peak_bytes"]["planned"]


def test_the_answers_of_the_base_stand_beside_the_tuned_ones_and_the_time_is_accounted_for(
    trained: tuple[Path, Done],
) -> None:
    lines = [json.loads(line) for line in (trained[0] / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(isinstance(line["base_prediction"], str) for line in lines)
    spent, summary = trained[1].json["phases_s"], trained[1].json
    assert spent["training"] == pytest.approx(summary["train_s"])
    assert sum(spent.values()) == pytest.approx(summary["wall_s"], rel=0.2)


def test_a_second_run_of_a_recipe_gets_the_next_folder(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        done = run_cli("train", recipe, "--json", "--set", "train.max_steps=1", "--set", "data.eval=null")
        assert done.json["run_dir"] == f"runs/tiny-{number}"
        assert done.json["eval"]["before"] is None and done.json["eval"]["after"] is None


# the other verbs


def test_merge_prints_what_the_contract_names_and_plain_transformers_loads_the_folder(
    merged: tuple[Path, Done],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, done = merged
    facts = done.json
    assert facts["out"] == str(run / "merged") and facts["dtype"] == "bf16"
    assert facts["adapter_effect"] > 0 and 0 <= facts["arithmetic_ratio"] < 0.01
    assert facts["storage_ratio"] > 0 and facts["ratio"] > 0
    assert {"peak_host_bytes", "proof_peak_host_bytes"} <= facts.keys()
    assert json.loads((run / "merge.json").read_text())["ratio"] == facts["ratio"]
    model = AutoModelForCausalLM.from_pretrained(run / "merged", local_files_only=True)
    assert not hasattr(model, "peft_config") and model.dtype.itemsize == 2
    assert AutoTokenizer.from_pretrained(run / "merged", local_files_only=True).chat_template


def test_merging_into_a_folder_that_holds_a_model_is_refused_and_leaves_it(merged: tuple[Path, Done]) -> None:
    run, _ = merged
    before = {path.name: path.stat().st_mtime_ns for path in (run / "merged").iterdir()}
    refused(run_cli("merge", run), "merged: already exists and is not an empty folder")
    assert {path.name: path.stat().st_mtime_ns for path in (run / "merged").iterdir()} == before
    assert left_over(run) == []


def test_merge_writes_where_it_is_told(trained: tuple[Path, Done], tmp_path: Path) -> None:
    run = copy_run(trained[0], tmp_path / "run")
    assert run_cli("merge", run, tmp_path / "out", "--json").json["out"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (run / "merged").exists()


def test_a_run_can_be_merged_another_way_than_its_recipe_says(trained: tuple[Path, Done], tmp_path: Path) -> None:
    run = copy_run(trained[0], tmp_path / "run")
    facts = run_cli(
        "merge", run, tmp_path / "out", "--set", "merge.base=original", "--set", "merge.dtype=fp32", "--json"
    ).json
    assert (facts["base"], facts["dtype"]) == ("original", "fp32") and facts["arithmetic_ratio"] < 0.01
    refused(
        run_cli("merge", run, "--set", "lora.r=8"),
        "its recipe is fixed by training, so lora.r=8 cannot be set",
    )
    refused(run_cli("merge", run, "--set", "merge.bsae=original"), "merge.bsae: unknown key; did you mean merge.base?")


@pytest.mark.parametrize("which", ["base", "adapter", "merged"])
def test_eval_scores_each_model_of_a_run(merged: tuple[Path, Done], trained: tuple[Path, Done], which: str) -> None:
    scores = run_cli("eval", merged[0], "--which", which, "--json").json
    assert scores.keys() >= {"exact_match", "f1", "loss", "num_examples"} and scores["num_examples"] == 4
    before_and_after = trained[1].json["eval"]
    expected = {"base": before_and_after["before"], "adapter": before_and_after["after"]}
    if which in expected:  # the very numbers of training, from files
        assert scores["loss"] == expected[which]["loss"]
    else:
        assert scores["loss"] == pytest.approx(before_and_after["after"]["loss"], rel=0.01)


def test_eval_scores_another_file(trained: tuple[Path, Done], recipe: Path) -> None:
    assert run_cli("eval", trained[0], "--data", recipe.parent / "train.json", "--json").json["num_examples"] == 24


def test_ask_answers_from_every_model_and_says_which_is_not_there(
    trained: tuple[Path, Done], merged: tuple[Path, Done], tmp_path: Path
) -> None:
    (tmp_path / "passage.txt").write_text("Paris is the capital of France.")
    arguments = ("What is the capital?", "--context", tmp_path / "passage.txt", "--which", "all", "--json")
    answers = run_cli("ask", merged[0], *arguments).json["answers"]
    assert answers.keys() == {"base", "adapter", "merged"} and all(isinstance(text, str) for text in answers.values())
    assert run_cli("ask", trained[0], *arguments).json["answers"]["merged"] is None
    assert run_cli("ask", trained[0], "What?", "--json").json["answers"].keys() == {"adapter"}


def test_report_writes_one_page_that_needs_nothing_else(merged: tuple[Path, Done]) -> None:
    run, _ = merged
    (run / "report.html").unlink()
    path = Path(run_cli("report", run, "--json").json["path"])
    page = path.read_text(encoding="utf-8")
    assert path == run / "report.html"
    for heading in (
        "Scores and answers",
        "Memory",
        "Training curves",
        "Disk",
        "Decisions and settings",
        "Merge proof",
    ):
        assert f">{heading}</h2>" in page
    assert not any(word in page for word in ("http:", "https:", "<script", "src=", 'href="h', 'href="/'))


def test_check_prints_what_the_contract_names_and_marks_what_is_trained(recipe: Path) -> None:
    found = run_cli("check", recipe, "--json").json
    assert (found["num_rows"], found["num_dropped"], found["format"]) == (24, 0, "SQuAD v1.1 JSON")
    assert [line["num_whole"] for line in found["truncation"]][-1] == 24
    assert len(found["rows"]) == 3
    trained_text = "".join(text for text, is_trained in found["rows"][0]["tokens"] if is_trained)
    first = json.loads((recipe.parent / "train.json").read_text())["data"][0]["paragraphs"][0]["qas"][0]
    assert trained_text.startswith(first["answers"][0]["text"])


def test_check_takes_several_recipes_and_prints_one_document(recipe: Path) -> None:
    assert len(run_cli("check", recipe, recipe, "--json").json["recipes"]) == 2


def test_recipes_are_listed_shown_copied_and_described(tmp_path: Path) -> None:
    listed = run_cli("recipes", "list", "--json").json["recipes"]
    assert listed[0]["name"] == "smollm2-135m_country-qa" and all(entry["description"] for entry in listed)
    shown = run_cli("recipes", "show", listed[0]["name"])
    assert run_cli("recipes", "copy", listed[0]["name"], tmp_path).code == 0
    assert (tmp_path / f"{listed[0]['name']}.yaml").read_text() == shown.stdout
    assert (tmp_path / "country_qa" / "train.json").is_file()
    refused(run_cli("recipes", "copy", listed[0]["name"], tmp_path), "would be overwritten")
    assert run_cli("recipes", "schema").json["properties"].keys() >= {"model", "lora", "train"}


# stopping and resuming


@pytest.fixture(scope="module")
def uninterrupted(home: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train_cli(recipe, run, "--set", f"train.max_steps={SIGNAL_STEPS}").code == 0
    return run


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_with_a_checkpoint_and_the_command_that_continues_it(
    number: signal.Signals, code: int, recipe: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "a run"  # a space, so that the command must be quoted
    words = ["train", str(recipe), "--set", f"train.max_steps={SIGNAL_STEPS}", "--run-dir", str(run), "--json"]
    done = stop_when(words, number, lambda: (run / "steps.jsonl").exists() and len(step_numbers(run)) >= 1)
    assert (done.code, done.stdout) == (code, ""), done.stderr
    steps = step_numbers(run)
    assert 1 <= len(steps) < SIGNAL_STEPS
    checkpoint, problems = newest_valid(run / "checkpoints")
    assert checkpoint is not None and checkpoint.name == f"step-{len(steps):06d}" and problems == []
    assert f"stopped after step {len(steps)} of {SIGNAL_STEPS}" in done.stderr and "Traceback" not in done.stderr
    command = done.last_line.strip()
    assert command == resume_command(str(recipe), [f"train.max_steps={SIGNAL_STEPS}"], run) and f"'{run}'" in command

    continued = run_cli(*shlex.split(command)[1:], "--json")
    assert continued.json["num_steps"] == SIGNAL_STEPS
    assert step_numbers(run) == list(range(1, SIGNAL_STEPS + 1))
    assert adapter_bytes(run) == adapter_bytes(uninterrupted)
    scores, expected = (json.loads((folder / "eval.json").read_text()) for folder in (run, uninterrupted))
    assert untimed(scores) == untimed(expected)  # the base's were taken once, before the signal


def test_a_signal_before_the_first_step_leaves_nothing(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    done = stop_when(["train", str(recipe), "--run-dir", str(run)], signal.SIGTERM, run.exists)
    assert done.code == 143, done.stderr
    assert "nothing was trained yet" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def untimed(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores without the seconds that answering took."""
    return {
        key: {name: each for name, each in value.items() if name != "answers_s"} if isinstance(value, dict) else value
        for key, value in scores.items()
    }


def stop_when(words: list[str], number: signal.Signals, ready: Callable[[], bool]) -> Done:
    """Run the command in a process of its own and send it `number` as soon as `ready()`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_lite", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline_s = time.monotonic() + 120
        while not ready() and process.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.005)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return Done(process.returncode, out, err)


def test_another_recipe_is_refused_by_name_before_anything_is_loaded(
    trained: tuple[Path, Done], recipe: Path, tmp_path: Path
) -> None:
    run = copy_run(trained[0], tmp_path / "run")
    done = train_cli(recipe, run, "--resume", "--set", "lora.r=8", "--set", "train.seed=5")
    refused(done, "cannot resume with another recipe: lora.r was 16, is 8; train.seed was 0, is 5")
    assert "loading the base" not in done.stderr


def test_a_finished_run_is_neither_overwritten_nor_resumed(trained: tuple[Path, Done], recipe: Path) -> None:
    run, _ = trained
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    refused(train_cli(recipe, run), "already exists and is not empty")
    refused(train_cli(recipe, run, "--resume"), "is finished (4 steps)", "qlora-lite merge")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_stopped_while_its_adapter_was_scored_is_completed(
    trained: tuple[Path, Done], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_run(trained[0], tmp_path / "run")
    whole = json.loads((run / "eval.json").read_text())
    (run / "train.json").unlink()
    RunDir(run).write_json("eval.json", {**whole, "after": None})
    memory = (run / "memory.json").read_bytes()
    summary = train_cli(recipe, run, "--resume", "--json").json
    assert summary["num_steps"] == NUM_STEPS and step_numbers(run) == list(range(1, NUM_STEPS + 1))
    assert untimed(summary["eval"]) == untimed({key: whole[key] for key in ("before", "after", "groups")})
    assert (run / "memory.json").read_bytes() == memory and adapter_bytes(run) == adapter_bytes(trained[0])


def test_resuming_needs_a_run(recipe: Path, tmp_path: Path) -> None:
    refused(run_cli("train", recipe, "--resume"), "add --run-dir DIR")
    done = train_cli(recipe, tmp_path / "none", "--resume")
    refused(done, "recipe.yaml is missing")
    assert "planning" not in done.stderr and list(tmp_path.iterdir()) == []


# what goes wrong


def test_every_problem_of_a_recipe_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("method: lorra\nlora:\n  r: 16x\ntrain:\n  learning_rat: 1\n  epochs: -3\n")
    done = train_cli(path, tmp_path / "run")
    refused(done)
    assert done.stderr.splitlines()[0].endswith("broken.yaml has 4 problems")
    for problem in ("line 1  method", "line 3  lora.r", "line 5  train.learning_rat", "line 6  train.epochs"):
        assert f"  {problem}" in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["broken.yaml"]


HOSTILE_DATA: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "binary": (bytes(range(256)) * 20, "looks like a binary file"),
    "no-questions": (b'{"data": []}', "no questions"),
    "deep": (b'{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 64 levels deep"),
    "deep-unclosed": (b"[" * 100_000, "nested more than 64 levels deep"),
}


@pytest.mark.parametrize("name", HOSTILE_DATA)
def test_data_that_cannot_be_used_is_named_and_leaves_no_run(name: str, recipe: Path, tmp_path: Path) -> None:
    content, why = HOSTILE_DATA[name]
    data = tmp_path / "data.json"
    data.write_bytes(content)
    done = train_cli(recipe, tmp_path / "run", "--set", f"data.train={data}", "--json")
    assert refused(done, why).startswith(str(data))
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.json"]


def cut_short(folder: Path) -> None:
    shutil.copytree(tiny_source(), folder, dirs_exist_ok=True)
    with (folder / "model.safetensors").open("rb+") as file:
        file.truncate(50_000)


def no_config(folder: Path) -> None:
    (folder / "readme.txt").write_text("no model")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (cut_short, "missing or damaged safetensors file"),
        (no_config, "not a model folder: config.json is missing"),
        (broken_config, "not valid JSON"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_named_and_leaves_no_run(
    make: Callable[[Path], None], why: str, recipe: Path, tmp_path: Path, home: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    make(base)
    refused(train_cli(recipe, tmp_path / "run", "--set", f"model.base={base}"), str(base), why)
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"] and left_over(home) == []


@pytest.mark.parametrize(
    ("base", "why"),
    [
        ("org/name", "fetch it with: qlora-lite fetch org/name"),
        ("smollm2-135m", "Fetch it with: qlora-lite fetch smollm2-135m"),
        ("smollm2-135n", "did you mean smollm2-135m?"),
    ],
)
def test_a_model_that_is_not_here_is_told_with_what_to_do(base: str, why: str, recipe: Path, tmp_path: Path) -> None:
    refused(train_cli(recipe, tmp_path / "run", "--set", f"model.base={base}"), base, why)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_run_directory_is_named_and_left(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(train_cli(recipe, tmp_path / "file"), "is a file, not a folder. Choose another")
    refused(train_cli(recipe, tmp_path / "file" / "run"), "cannot be written (Not a directory)")
    assert (tmp_path / "file").read_text() == "mine"


def fail_to_sync(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if path.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def fail_to_save(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = state.save_file

    def save_file(*arguments: Any) -> None:
        if path.exists():  # in these words, and as no OSError
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(*arguments)

    monkeypatch.setattr(state, "save_file", save_file)


@pytest.mark.parametrize("fail", [fail_to_sync, fail_to_save])
def test_a_disk_that_is_full_at_a_checkpoint_keeps_the_one_before_and_the_run_can_go_on(
    fail: Callable[[Path, pytest.MonkeyPatch], None], trained: tuple[Path, Done], recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        fail(run / "checkpoints" / "step-000002", patch)
        refused(train_cli(recipe, run), "step", "cannot be written", "No space left on device")
    checkpoint, problems = newest_valid(run / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "step-000002" and problems == []
    assert left_over(run) == [] and not (run / "adapter").exists()
    assert train_cli(recipe, run, "--resume").code == 0
    assert step_numbers(run) == [1, 2, 3, 4] and adapter_bytes(run) == adapter_bytes(trained[0])


def test_a_loss_that_is_no_number_names_step_and_rows_and_keeps_the_last_good_checkpoint(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real, calls = tmp_path / "run", step.forward_backward, []

    def forward_backward(model: Any, batches: Any, *, observer: Any, **others: Any) -> float:
        calls.append(batches)
        if len(calls) == 4:
            observer.see_loss(batches[0], float("nan"))
        return real(model, batches, observer=observer, **others)

    monkeypatch.setattr(step, "forward_backward", forward_backward)
    done = train_cli(recipe, run, "--json")
    message = refused(done, "stopped at step 4: the loss is nan; rows ")
    ids = {question["id"] for question in questions(recipe.parent / "train.json")}
    named = set(message.split("; rows ")[1].split(". ")[0].split(", "))
    assert len(named) == 4 and named <= ids
    checkpoint, _ = newest_valid(run / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "step-000003" and step_numbers(run) == [1, 2, 3]
    refused(run_cli("merge", run), "training is not finished", "--resume")


def questions(path: Path) -> list[dict[str, Any]]:
    return [qa for paragraph in json.loads(path.read_text())["data"][0]["paragraphs"] for qa in paragraph["qas"]]


@pytest.mark.parametrize("command", [("ask", "Why?"), ("eval",), ("merge",)])
def test_a_run_that_is_not_finished_says_how_to_finish_it(
    command: tuple[str, ...], trained: tuple[Path, Done], tmp_path: Path
) -> None:
    run = copy_run(trained[0], tmp_path / "run")
    shutil.rmtree(run / "adapter")
    verb, *rest = command
    refused(run_cli(verb, run, *rest), "training is not finished", "--resume")


def test_the_merged_model_of_a_run_that_was_not_merged_is_told_with_what_to_do(trained: tuple[Path, Done]) -> None:
    run, _ = trained
    for command in (("eval", run, "--which", "merged"), ("ask", run, "Why?", "--which", "merged")):
        refused(run_cli(*command), "does not exist yet. Create it with: qlora-lite merge")


def test_a_model_name_that_does_not_exist_is_told_before_anything_is_loaded(trained: tuple[Path, Done]) -> None:
    for command in (("eval", trained[0]), ("ask", trained[0], "Why?")):
        done = run_cli(*command, "--which", "best")
        refused(done, "--which: expected one of base, adapter, merged", "'best'")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "content", [None, b"\xff\xfe\x00no tex", b"caf\xe9", "passage".encode("utf-16-le"), b"PK\x03\x04zip"]
)
def test_a_context_that_is_missing_or_no_text_is_named(
    content: bytes | None, trained: tuple[Path, Done], tmp_path: Path
) -> None:
    path = tmp_path / "passage.txt"
    if content is not None:
        path.write_bytes(content)
    refused(run_cli("ask", trained[0], "Why?", "--context", path), str(path), "not readable as UTF-8 text")


def test_a_folder_that_is_no_run_is_told_by_every_verb(tmp_path: Path) -> None:
    for verb, *rest in (("eval",), ("merge",), ("ask", "Why?"), ("report",)):
        refused(run_cli(verb, tmp_path, *rest), "not a run: recipe.yaml is missing")
    assert list(tmp_path.iterdir()) == []


def test_a_row_limit_that_drops_every_label_is_refused_by_check_and_train(recipe: Path, tmp_path: Path) -> None:
    change = ("--set", "data.max_seq_length=16")
    refused(run_cli("check", recipe, *change), "every row would lose its labels")
    refused(train_cli(recipe, tmp_path / "run", *change), "rows would lose their answer")
    assert list(tmp_path.iterdir()) == []
