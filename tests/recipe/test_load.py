"""A recipe is read whole or refused whole: promise 10, the overrides, the paths, and what a run writes down."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lite.errors import RecipeError
from qlora_lite.recipe import Recipe, dump_recipe, load_recipe, load_run_recipe
from qlora_lite.recipe.schema import known_keys


def write(folder: Path, text: str, name: str = "my.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides=overrides)
    return caught.value.problems


def test_every_wrong_recipe_key_is_reported_in_one_message_with_line_and_nearest_key(tmp_path):
    path = write(
        tmp_path,
        "methd: qlora\n"  # 1 misspelt
        "lora:\n"
        "  r: 16x\n"  # 3 wrong type
        "  learning_rate: 1e-4\n"  # 4 right key, wrong section
        "r: 8\n"  # 5 right key, no section
        "trian:\n"  # 6 misspelt section ...
        "  learning_rat: 1e-4\n"  # 7 ... with a misspelt key
        "  seed: -1\n"  # 8 ... and a value out of range
        "data:\n"
        "  train: nowhere.json\n"  # 10 no such file
        "  eval: null\n"
        "memory: {budget: auto, budget: auto}\n"  # 12 twice
        "merge: 5\n"  # 13 no section
        "train: {batch_size: 4}\n",  # 14 another tool's name
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides=["train.max_stepz=3", "model.attention=eager"])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path} has 13 problems"
    assert [line.split(": ")[0] for line in lines[1:]] == [
        "  line 1  methd",
        "  line 3  lora.r",
        "  line 4  lora.learning_rate",
        "  line 5  r",
        "  line 6  trian",
        "  line 7  trian.learning_rat",
        "  line 8  train.seed",
        "  line 10 data.train",
        "  line 12 memory.budget",
        "  line 13 merge",
        "  line 14 train.batch_size",
        "  --set train.max_stepz=3  train.max_stepz",
        "  --set model.attention=eager  model.attention",
    ]
    text = str(caught.value)
    for sentence in (
        "methd: unknown key; did you mean method?",
        'lora.r: expected a whole number from 1 to 4,096, got "16x"',
        "lora.learning_rate: unknown key; did you mean train.learning_rate?",
        "  r: unknown key; did you mean lora.r?",
        "trian: unknown key; did you mean train?",
        "trian.learning_rat: unknown key; did you mean train.learning_rate?",
        "train.seed: expected a whole number from 0 to 4,294,967,295, got -1",
        f"no such file; looked at {tmp_path / 'nowhere.json'} and ",
        "memory.budget: given twice, first on line 12; keep one of them",
        "merge: expected keys below it, such as merge.dtype, got 5",
        "train.batch_size: unknown key; did you mean train.examples_per_step?",
        "train.max_stepz: unknown key; did you mean train.max_steps?",
        'model.attention: "eager" is not supported in this version; use auto or sdpa',
    ):
        assert sentence in text.replace("line 5  ", "line 5    "), sentence


@pytest.mark.parametrize("key", list(known_keys()))
def test_a_misspelling_of_any_key_is_led_back_to_it(key):
    wrong = key[:-1] + "q" if len(key.rpartition(".")[2]) > 2 else key + "x"
    (problem,) = problems_of("smollm2-135m_country-qa", f"{wrong}=1")
    assert f"{wrong}: unknown key; did you mean {key}?" in problem or key == "lora.r", problem


@pytest.mark.parametrize("written", ["2e-4", "2E-4", "0.0002", ".2e-3", "2.0e-04"])
def test_a_learning_rate_may_be_written_as_people_write_it(tmp_path, written):
    path = write(tmp_path, f"train: {{learning_rate: {written}}}\n")
    assert load_recipe(path).train.learning_rate == 2e-4
    assert load_recipe(path, overrides=[f"train.learning_rate={written}"]).train.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.r=16x", 'expected a whole number from 1 to 4,096, got "16x"'),
        ('lora.r="16"', 'got "16"'),
        ("lora.r=true", "got true"),
        ("lora.r=0", "got 0"),
        ("lora.r=1e1", "got 1e1"),
        ("lora.r=null", "got null"),
        ("lora.r=" + "9" * 5000, "got "),
        ("lora.r=[1]", "got [1]"),
        ("lora.r={a: 1}", "got a mapping"),
        ("lora.lora_dropout=1", "below 1, got 1"),
        ("train.learning_rate=.nan", "got .nan"),
        ("train.learning_rate=.inf", "got .inf"),
        ("train.learning_rate=1e999", "got 1e999"),
        ("train.learning_rate=true", "got true"),
        ("train.keep_checkpoints=0", "got 0"),
        ("train.optimizer=adamw_8bt", "did you mean paged_adamw_8bit?"),
        ("train.schedule=cosin", "did you mean cosine?"),
        ("method=qlra", 'expected "qlora", "lora" or "full", got "qlra"; did you mean qlora?'),
        ("lora.use_rslora=yes", 'expected true or false, got "yes"'),
        ("lora.target_modules=q_proj", 'expected "all-linear" or a list of names such as [a, b], got "q_proj"'),
        ("lora.target_modules=[q_proj, 3]", 'got ["q_proj", 3]'),
        ("data.no_answer_text=0", 'got 0; if it is text, quote it: "0"'),
        ('data.no_answer_text=" "', "expected text that is not blank"),
        ("memory.budget=12 parsecs", 'expected "auto" or a size such as "24GiB", got "12 parsecs"'),
        ("memory.budget=" + "9" * 400 + "GiB", "expected"),
        ("merge.proof=true", 'expected "auto" or a whole number above 0, got true'),
        ("device=gpu", 'expected "auto", "cpu" or "cuda", got "gpu"'),
        ("data.train=\x1b[31m\udcff", "\\x1b[31m"),
        ("lora.init_from=\x1b]0;x\x07", "\\x1b]0;x\\x07"),
        ("train=3", "train: expected keys below it, such as train.epochs, got 3"),
        ("train.max_steps", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("data.eval=", "no value after the =; write null for no value"),
        ("lora.target_modules=[[[", "not valid YAML"),
        ("lora.target_modules=" + "[" * 100_000, "nested more than 16 levels deep"),
        ('data.train="a\\0b"', "no such file"),
        ('data.train="\\ud800"', "expected text"),
        ("data.train=" + "x" * 10_000, "no such file"),
        ("data.train=.", "is a folder, but not one written by datasets' save_to_disk"),
        ("data.train=[]", "a list of files, each a path or {path: ..., weight: ...}, got []"),
        (
            "data.train=[{path: a.json, weight: 0}]",
            "a list of files, each a path or {path: ..., weight: ...}, got [a mapping]",
        ),
        ("data.train=[nowhere.json]", "no such file; looked at"),
        ("data.format=alpacca", "did you mean alpaca?"),
        ("model.base=smollm2-135", "did you mean smollm2-135m?"),
        ("model.base=/no/such/folder", "no such folder or .gguf file; looked at /no/such/folder"),
        ("model.base=org/missing.gguf", "no such folder or .gguf file"),
    ],
)
def test_a_wrong_value_says_what_is_allowed_and_what_was_found(override, expected):
    (problem,) = problems_of("smollm2-135m_country-qa", override)
    assert expected in problem
    assert problem.startswith("--set ")
    assert problem.isprintable()
    assert len(problem) < 11_000 and problem.encode("utf-8")


def test_a_good_override_mends_a_wrong_value_and_the_last_of_two_counts(tmp_path):
    path = write(tmp_path, "lora: {r: 16x}\n")
    assert load_recipe(path, overrides=["lora.r=4", "lora.r=8"]).lora.r == 8


def test_overrides_take_lists_text_and_null():
    recipe = load_recipe(
        "smollm2-135m_country-qa",
        overrides=[
            "lora.target_modules=[q_proj, v_proj]",
            "data.no_answer_text=no",  # text, not false as in YAML 1.1
            "data.num_train=null",
            "train.max_steps=1",
            "train.epochs=0.5",
            "merge.proof=12",
            "merge.dtype=fp32",
            "memory.gradient_checkpointing=true",
            "data.share_prefixes=false",
            "data.max_seq_length=256",
        ],
    )
    assert recipe.lora.target_modules == ("q_proj", "v_proj")
    assert (recipe.data.no_answer_text, recipe.data.num_train, recipe.data.max_seq_length) == ("no", None, 256)
    assert (recipe.train.max_steps, recipe.train.epochs) == (1, 0.5)
    assert (recipe.merge.proof, recipe.merge.dtype) == (12, "fp32")
    assert recipe.memory.gradient_checkpointing is True and recipe.data.share_prefixes is False


@pytest.mark.parametrize("value", ["eager", "flash_attention_2", "flex_attention"])
def test_what_this_version_does_not_carry_out_is_refused_by_name(value):
    problem = problems_of("smollm2-135m_country-qa", f"model.attention={value}")[0]
    assert problem.startswith(f"--set model.attention={value}  model.attention: ")
    assert value in problem and "is not supported in this version; " in problem


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("train.epochs=null",), "train.epochs: null, and so is train.max_steps: training has no end"),
        (("lora.target_modules=[]",), "lora.target_modules: an empty list, so no layer gets factors"),
        (("train.eval_every_steps=5", "data.eval=null"), "train.eval_every_steps: needs held-out rows"),
        (
            ("method=full", "lora.use_dora=true"),
            "lora.use_dora: applies to factors, but method full trains the weights themselves",
        ),
        (("method=full", "train.loraplus_ratio=4"), "train.loraplus_ratio: applies to factors"),
        (
            ("lora.target_modules=[]", "lora.modules_to_save=[lm_head]"),
            "lora.target_modules: an empty list, so no layer gets factors",
        ),
        (("train.early_stop=5",), "train.early_stop: needs evaluations during training"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(overrides, expected):
    assert any(expected in problem for problem in problems_of("smollm2-135m_country-qa", *overrides))


def test_no_epochs_is_fine_with_max_steps():
    recipe = load_recipe("smollm2-135m_country-qa", overrides=["train.epochs=null", "train.max_steps=3"])
    assert (recipe.train.epochs, recipe.train.max_steps) == (None, 3)


def test_paths_are_looked_up_beside_the_recipe_then_in_the_current_folder(tmp_path, monkeypatch):
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
        (folder / "both.json").write_text("{}")
    (here / "only_here.json").write_text("{}")
    (here / "model").mkdir()
    (beside / "small.gguf").write_bytes(b"GGUF")
    (here / "notes.txt").write_text("")
    monkeypatch.chdir(here)
    path = write(beside, "data: {train: both.json, eval: only_here.json}\nmodel: {base: model}\n")
    recipe = load_recipe(path)
    assert recipe.data.train == str(beside / "both.json")
    assert recipe.data.eval == str(here / "only_here.json")
    assert recipe.model.base == str(here / "model")
    assert load_recipe(path, overrides=["model.base=small.gguf"]).model.base == str(beside / "small.gguf")
    assert "expected a folder or a .gguf file" in problems_of(path, "model.base=notes.txt")[0]
    (problem,) = problems_of(path, "data.train=bth.json")
    looked = f"{beside / 'bth.json'} and {here / 'bth.json'}"
    assert problem.endswith(f"no such file; looked at {looked}; did you mean {beside / 'both.json'}?")


def adapter_folder(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    document = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def test_an_adapter_to_start_from_is_looked_up_beside_the_recipe_and_must_agree_with_it(tmp_path):
    adapter = adapter_folder(tmp_path / "runs" / "one" / "adapter", use_rslora=True)
    path = write(tmp_path, "lora: {init_from: runs/one/adapter, r: 8}\n")
    (problem,) = problems_of(path)
    assert problem.endswith(
        "lora.use_rslora: false, but the adapter of lora.init_from has true; use the adapter's value"
    )
    assert load_recipe(path, overrides=["lora.use_rslora=true"]).lora.init_from == str(adapter)
    problems = problems_of(path, "lora.r=16", "lora.lora_alpha=16")
    assert [problem.split("  ")[-1] for problem in problems] == [
        "lora.r: 16, but the adapter of lora.init_from has 8; use the adapter's value",
        "lora.lora_alpha: 16, but the adapter of lora.init_from has 32; use the adapter's value",
        "lora.use_rslora: false, but the adapter of lora.init_from has true; use the adapter's value",
    ]
    assert len(problems_of(path, "lora.r=16x", "lora.use_rslora=true")) == 1  # a wrong value is not compared as well


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "eva", "loftq", "PiSSA"])
def test_other_ways_to_begin_are_refused_by_name_with_the_reason(tmp_path, name):
    (problem,) = problems_of(write(tmp_path, f"lora: {{init_from: {name}}}\n"))
    assert f"{name} is not supported" in problem.replace('"', "") and "change the frozen base" in problem


def test_an_adapter_that_began_another_way_is_refused_and_a_folder_of_such_a_name_is_not(tmp_path):
    adapter_folder(tmp_path / "eva_run", init_lora_weights="pissa_niter_4")
    adapter_folder(tmp_path / "pissa_run", init_lora_weights="eva")
    (problem,) = problems_of(write(tmp_path, "lora: {init_from: eva_run, r: 8}\n"))
    assert "was trained on weights that its initialization changed" in problem and "pissa_niter_4" in problem
    path = write(tmp_path, "lora: {init_from: pissa_run, r: 8}\n")
    assert load_recipe(path).lora.init_from == str(tmp_path / "pissa_run")


def test_a_folder_that_is_no_adapter_is_refused_with_the_one_that_was_meant(tmp_path):
    adapter_folder(tmp_path / "run" / "adapter")
    (tmp_path / "empty").mkdir()
    path = write(tmp_path, "lora: {r: 8}\n")
    for name, expected in (
        ("run", f"is not an adapter: adapter_config.json is missing; did you mean {tmp_path / 'run' / 'adapter'}?"),
        ("empty", f"{tmp_path / 'empty'} is not an adapter: adapter_config.json is missing"),
        ("nowhere", f"no such folder; looked at {tmp_path / 'nowhere'} and "),
    ):
        (problem,) = problems_of(path, f"lora.init_from={name}")
        assert expected in problem, name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 100_000, "is not valid JSON"),
        ("\udcff", "is not valid JSON"),
        ("[]", "is not the config of a LoRA adapter"),
        ('{"peft_type": "IA3"}', "is not the config of a LoRA adapter"),
        ('{"peft_type": "LORA", "r": {}, "lora_alpha": 32}', "has "),
        ('{"peft_type": "LORA", "r": 8, "lora_alpha": 32, "alpha_pattern": {"q_proj": 4}}', "alpha_pattern"),
    ],
)
def test_an_adapter_that_the_recipe_cannot_continue_is_refused(text, expected, tmp_path):
    folder = adapter_folder(tmp_path / "adapter")
    (folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (problem,) = problems_of(write(tmp_path, "lora: {init_from: adapter, r: 8}\n"))
    assert expected in problem and problem.isprintable()


def test_a_run_that_started_from_an_adapter_is_read_also_when_that_is_gone(tmp_path):
    folder = adapter_folder(tmp_path / "adapter")
    recipe = load_recipe(write(tmp_path, "lora: {init_from: adapter, r: 8}\n"))
    saved = write(tmp_path, dump_recipe(recipe), "recipe.yaml")
    (folder / "adapter_config.json").unlink()
    folder.rmdir()
    assert load_run_recipe(saved) == recipe


def test_several_training_files_are_paths_or_have_weights_and_each_is_looked_up(tmp_path, monkeypatch):
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
    for path in (beside / "a.jsonl", here / "b.csv"):
        path.write_text("{}")
    monkeypatch.chdir(here)
    path = write(beside, "data:\n  train:\n    - a.jsonl\n    - {path: b.csv, weight: 0.5}\n  eval: null\n")
    files = ((str(beside / "a.jsonl"), 1.0), (str(here / "b.csv"), 0.5))
    recipe = load_recipe(path)
    assert recipe.data.train_files == files
    assert load_recipe(path, overrides=["data.train=[a.jsonl, {path: b.csv, weight: 0.5}]"]) == recipe
    assert load_recipe(path, overrides=["data.train=a.jsonl"]).data.train_files == files[:1]
    assert load_recipe(write(tmp_path, dump_recipe(recipe), "recipe.yaml")) == recipe
    problems = problems_of(path, "data.train=[b.jsonl, {path: c.csv}]")
    assert [problem.partition("looked at ")[2].partition(" ")[0] for problem in problems] == [
        str(beside / "b.jsonl"),
        str(beside / "c.csv"),
    ]
    (problem,) = problems_of(path, "data.train=[{path: b.csv, wieght: 2}]")
    assert "expected text that is not blank or a list of files, each a path or {path: ..., weight: ...}" in problem


def test_a_folder_that_datasets_saved_is_a_data_file(tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    recipe = load_recipe(write(tmp_path, "data: {train: saved, eval: null}\n"))
    assert recipe.data.train == str(tmp_path / "saved")


def test_a_local_folder_named_like_a_hub_model_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("smollm2-135m_country-qa", overrides=["model.base=org/name"])
    assert recipe.model.base == str(tmp_path / "org" / "name")


def test_own_training_data_are_never_scored_on_the_shipped_ones_in_silence(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    recipe = load_recipe(write(tmp_path, "data: {train: mine.json}\n"))
    assert recipe.data.eval is None
    assert any("data.eval: null, because" in str(note) for note in recipe.notes)
    recipe = load_recipe("smollm2-135m_country-qa", overrides=[f"data.train={tmp_path / 'mine.json'}"])
    assert any("data.eval from the recipe" in str(note) for note in recipe.notes)


def test_a_short_recipe_has_the_defaults_of_the_shipped_one(tmp_path):
    path = write(tmp_path, "method: qlora\nlora:\n")
    own = ["data.num_train=600", "train.learning_rate=2e-4", "memory.budget=auto"]
    assert load_recipe(path) == load_recipe("smollm2-135m_country-qa", overrides=own)
    assert load_recipe(path).notes == ()
    assert set(Recipe().model_dump()) == set(load_recipe(path).model_dump())


def test_a_run_writes_down_a_recipe_that_loads_back_equal(tmp_path):
    odd = tmp_path / "a: b # ü 1e5"
    odd.mkdir()
    for name in ("2e-4", "no"):
        (odd / name).write_text("{}")
    recipe = load_recipe(
        "smollm2-135m_country-qa",
        overrides=[
            f"data.train={odd / '2e-4'}",
            f"data.eval={odd / 'no'}",
            'data.no_answer_text="1e5"',
            'lora.target_modules=[q_proj, "no", "1e3", "~", "true", "0o7", "1_0", "2020-01-01"]',
            "train.learning_rate=1e-05",
            "train.max_grad_norm=1e8",
            "data.max_seq_length=512",
        ],
    )
    assert recipe.lora.target_modules[1:4] == ("no", "1e3", "~")
    again = load_recipe(write(tmp_path, dump_recipe(recipe), "recipe.yaml"))
    assert again == recipe and hash(again) == hash(recipe)
    assert (again.name, again.path) == ("recipe", tmp_path / "recipe.yaml")
    assert dump_recipe(again).splitlines()[1:] == dump_recipe(recipe).splitlines()[1:]
    assert load_recipe(again.path, overrides=["train.seed=1"]) != again


def test_the_recipe_of_a_run_is_read_also_when_its_data_are_gone(tmp_path):
    for name in ("rows.json", "base.gguf"):
        (tmp_path / name).write_text("{}")
    path = write(tmp_path, "data: {train: rows.json, eval: rows.json}\nmodel: {base: base.gguf}\n")
    recipe = load_recipe(path)
    saved = write(tmp_path, dump_recipe(recipe), "recipe.yaml")
    for name in ("rows.json", "base.gguf"):
        (tmp_path / name).unlink()
    assert load_run_recipe(saved) == recipe
    assert len(problems_of(saved)) == 3
    saved.write_text(saved.read_text().replace("seed: 0", "sed: 0"))
    with pytest.raises(RecipeError, match=r"did you mean train\.seed"):
        load_run_recipe(saved)
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_run_recipe(tmp_path / "gone.yaml")


def test_a_recipe_cannot_be_changed_after_loading():
    recipe = load_recipe("smollm2-135m_country-qa")
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.seed = 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2-135m_country-q", "did you mean smollm2-135m_country-qa?"),
        ("nothing-like-it", "shipped recipes: bloom-560m_qa, llama-3.1-8b_qa-24gb"),
        ("/no/such/folder/smollm2-135m_squad.yaml", "did you mean the shipped recipe smollm2-135m_squad?"),
        ("a\0b", "no such file"),
        ("x" * 5000, "no such file"),
    ],
)
def test_a_missing_recipe_is_named_with_what_there_is(name, expected):
    (problem,) = problems_of(name)
    assert expected in problem


def test_a_folder_or_an_unreadable_file_is_no_recipe(tmp_path):
    assert "is a folder" in problems_of(tmp_path)[0]
    if os.geteuid() != 0:
        path = write(tmp_path, "method: qlora\n")
        path.chmod(0)
        assert "cannot be read: Permission denied" in problems_of(path)[0]


def test_a_recipe_is_checked_without_importing_torch(tmp_path, repository):
    code = (
        "import sys; from qlora_lite.recipe import load_recipe, recipe_json_schema; "
        "load_recipe('smollm2-135m_country-qa'); recipe_json_schema(); "
        "sys.exit(', '.join({'torch', 'transformers', 'datasets', 'rich'} & set(sys.modules)) or 0)"
    )
    env = {**os.environ, "PYTHONPATH": str(repository)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
