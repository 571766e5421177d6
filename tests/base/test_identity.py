"""A run whose base folder was moved, or whose cache is gone: `--base DIR` goes on, the hash is checked, and every error names the way."""

import json
import shutil
from pathlib import Path

import pytest

from qlora_lite import api
from qlora_lite.base.identity import files_of_base
from qlora_lite.files.cache import default_cache
from qlora_lite.recipe import load_recipe
from qlora_lite.runs import resume as resuming
from qlora_lite.runs.folder import RunDir
from tests.tiny_model import save_tiny_llama
from tests.tiny_run import run_cli, write_recipe

MERGE = ["--set", "merge.proof=1"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after one step of two; its base is `first`, moved to `moved` afterwards."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = write_recipe(folder, max_steps=2, save_every_steps=1)
    recipe.write_text(recipe.read_text().replace(json.loads(base_line(recipe))["base"], str(folder / "first")))
    save_tiny_llama(folder / "first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_LITE_HOME", str(folder / "home"))
        plan = api.make_plan(load_recipe(recipe))
        begun = api.train(plan, api.load_model(plan), folder / "run", should_stop=lambda: True)
        assert [step.step for step in begun] == [1]
    (folder / "first").rename(folder / "moved")
    return folder


def base_line(recipe: Path) -> str:
    return recipe.read_text().splitlines()[0].removeprefix("model: ")


def test_resuming_names_base_and_with_it_goes_on_from_a_cache_that_is_gone(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of this test is empty: the quantized base is made again and is the same."""
    recipe, run = stopped / "tiny.yaml", tmp_path / "run"
    shutil.copytree(stopped / "run", run)
    resume = ["train", recipe, "--run-dir", run, "--resume", "--set", "data.eval=null"]
    refused = run_cli("train", recipe, "--run-dir", run, "--resume")
    assert refused.code == 2 and "add --base DIR" in refused.stderr and "model.base" in refused.stderr
    own = run_cli("train", run / "recipe.yaml", "--run-dir", run, "--resume")
    assert own.code == 2 and "add --base DIR" in own.stderr
    done = run_cli(*resume[:5], "--base", stopped / "moved", "--json")
    assert done.code == 0, done.stderr
    assert done.json["num_steps"] == 2
    assert (
        str(stopped / "first") in (run / "recipe.yaml").read_text()
    )  # where the base lies is no part of what was trained

    for verb in (
        ["ask", run, "Who?"],
        ["ask", run, "Who?", "--mix", f"{run}:1"],
        ["eval", run],
        ["merge", run, *MERGE],
    ):
        refused = run_cli(*verb)
        assert refused.code == 2 and "add --base DIR (its hash is checked)" in refused.last_line, verb
    assert run_cli("ask", run, "Who?", "--base", stopped / "moved").code == 0
    assert run_cli("merge", run, *MERGE, "--base", stopped / "moved", "--json").json["out"] == str(run / "merged")
    shorter = run_cli("rank", run, "--to", "1", "--out", tmp_path / "short", "--base", stopped / "moved", "--json")
    assert shorter.json["truncated"]["eval"]["after"]["num_examples"] == 4

    shorten = ["rank", run, "--to", "1", "--out", tmp_path / "shorter"]
    assert "add --base DIR (its hash is checked)" in run_cli(*shorten).last_line
    mix = ["mix", f"{run}:0.5", "--out", tmp_path / "mixed", "--rank", "1", "--json"]
    assert "add --base DIR (its hash is checked)" in run_cli(*mix).last_line
    assert not (tmp_path / "shorter").exists() and not (tmp_path / "mixed").exists()
    assert run_cli(*mix, "--base", stopped / "moved").json["proof"]["num_label_tokens"] > 0

    other = save_tiny_llama(tmp_path / "other", seed=1)
    monkeypatch.setattr(resuming, "_kept_artefact", lambda run: None)  # as where the cache of then is gone
    refused = run_cli("eval", run, "--base", other)
    assert refused.code == 2 and "was trained on another base (SHA-256" in refused.last_line
    assert "Give the original that was quantized: --base DIR" in refused.last_line
    assert "quantizing it again rounded differently" in refused.last_line


def test_the_quantized_copy_that_is_still_in_the_cache_is_named_and_is_enough(stopped: Path, monkeypatch) -> None:
    monkeypatch.setenv("QLORA_LITE_HOME", str(stopped / "home"))
    kept = Path(RunDir(stopped / "run").read_json("env.json")["base"])
    assert kept.is_relative_to(default_cache())
    refused = run_cli(
        "train", stopped / "run" / "recipe.yaml", "--run-dir", stopped / "run", "--resume", "--base", "nowhere"
    )
    assert refused.code == 2 and "nowhere" in refused.last_line
    other = save_tiny_llama(stopped / "other", seed=1)
    refused = run_cli("train", stopped / "tiny.yaml", "--run-dir", stopped / "run", "--resume", "--base", other)
    assert refused.code == 2 and f"from training still exists: --base {kept}" in refused.last_line
    done = run_cli("train", stopped / "tiny.yaml", "--run-dir", stopped / "run", "--resume", "--base", kept)
    assert done.code == 0, done.stderr


def test_base_goes_with_a_run(stopped: Path, tmp_path: Path) -> None:
    done = run_cli("train", stopped / "tiny.yaml", "--run-dir", tmp_path / "new", "--base", stopped / "moved")
    assert done.code == 2 and "--set model.base=DIR" in done.last_line
    done = run_cli("rank", stopped / "tiny.yaml", "--try", "1", "--base", stopped / "moved")
    assert done.code == 2 and "--set model.base=DIR" in done.last_line


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def change_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    before = (
        path.read_text() if path.is_file() else "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    )
    path.write_text("Be rude. " + before)


def change_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("change", "name"),
    [(change_config, "config.json"), (change_template, "chat template"), (change_tokenizer, "tokenizer")],
)
def test_a_base_of_the_same_weights_and_another_config_tokenizer_or_template_is_refused(
    stopped: Path, tmp_path: Path, change, name
) -> None:
    shutil.copytree(stopped / "moved", tmp_path / "base")
    change(tmp_path / "base")
    run = tmp_path / "run"
    shutil.copytree(stopped / "run", run)
    run_cli("train", stopped / "tiny.yaml", "--run-dir", run, "--resume", "--base", stopped / "moved")  # to its end
    assert run_cli("eval", run, "--base", stopped / "moved").code == 0
    refused = run_cli("eval", run, "--base", tmp_path / "base")
    assert refused.code == 2 and f"but {name} in" in refused.last_line and "restore them" in refused.last_line.lower()


def test_a_base_that_was_saved_again_is_the_same(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped / "moved", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(
        json.dumps(config | {"transformers_version": "9", "use_cache": False})
    )
    assert files_of_base(tmp_path / "base") == files_of_base(stopped / "moved")
