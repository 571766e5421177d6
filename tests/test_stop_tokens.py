"""The trained stop token in all that is written for others, and ids beyond the embedding in every verb; from recipe to merged folder."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from qlora_lite.base.generation_settings import add_stop_tokens, stop_ids
from qlora_lite.data.template import ChatTemplate, Vocabulary
from qlora_lite.errors import ModelError, RecipeError
from qlora_lite.evaluation.generate import answer_tokenizer, generate_answers, stop_tokens
from qlora_lite.recipe import load_recipe
from tests.data.tiny_tokenizer import CHATML, make_tokenizer
from tests.tiny_model import save_tiny_llama
from tests.tiny_run import run_cli, train_cli

STOP, END = 2, 0  # <|im_end|>, <|endoftext|>
SHORT = ["--set", "train.max_steps=1", "--set", "train.examples_per_step=2", "--set", "eval.max_new_tokens=2"]


def write_base(folder: Path, *, generation: dict | None, template: str = CHATML, special: tuple[str, ...] = ()) -> Path:
    """A base whose end of text is not where its template stops."""
    save_tiny_llama(folder, eos_token_id=END, vocab_size=320)
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    make_tokenizer(template, special_tokens=special, **names).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def write_recipe(folder: Path, base: Path, completion: str = "yes") -> Path:
    rows = [{"prompt": f"say {i}", "completion": completion} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "r.yaml").write_text(
        f"model: {{base: {base}}}\ndata: {{train: rows.jsonl, eval: rows.jsonl}}\nlora: {{r: 2}}\n"
    )
    return folder / "r.yaml"


def eos_of(folder: Path) -> list[int]:
    return stop_ids(GenerationConfig.from_pretrained(str(folder)).eos_token_id)


@pytest.mark.parametrize("generation", [{"eos_token_id": [END, 5], "temperature": 0.5, "do_sample": True}, None])
def test_adapter_and_merged_folder_stop_where_training_stopped(tmp_path, generation):
    recipe = write_recipe(tmp_path, write_base(tmp_path / "base", generation=generation))
    assert train_cli(recipe, tmp_path / "run", *SHORT).code == 0
    done = run_cli("merge", tmp_path / "run")
    assert done.code == 0, done.stderr
    own = [END, 5] if generation else [END]
    for name in ("adapter", "merged"):
        assert eos_of(tmp_path / "run" / name) == [*own, STOP]
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "run" / "merged"))
    assert merged.generation_config.eos_token_id == [*own, STOP]
    if generation:
        assert merged.generation_config.temperature == 0.5, "the base's own settings stay"


def test_weights_of_method_full_stop_there_too(tmp_path):
    recipe = write_recipe(tmp_path, write_base(tmp_path / "base", generation={"eos_token_id": END}))
    assert train_cli(recipe, tmp_path / "run", *SHORT, "--set", "method=full").code == 0
    assert eos_of(tmp_path / "run" / "weights") == [END, STOP]
    assert run_cli("verify", tmp_path / "run").code == 0


def test_plain_generate_of_what_we_write_ends_at_the_trained_token_and_so_do_our_answers(tmp_path):
    folder = write_base(tmp_path / "base", generation=None)
    model = LlamaForCausalLM.from_pretrained(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    prompt = tokenizer("say", return_tensors="pt")["input_ids"]
    said = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=-1)[0, prompt.shape[1] :].tolist()
    last = next(i for i in range(1, 8) if said[i] not in said[:i])
    add_stop_tokens(folder, [said[last]], base=folder)
    again = LlamaForCausalLM.from_pretrained(str(folder))
    assert again.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :].tolist() == said[: last + 1]
    assert stop_tokens(again, STOP) == [STOP, END, said[last]]
    (answer,) = generate_answers(again, tokenizer, [prompt[0].tolist()], stop_token=STOP, max_new_tokens=8)
    assert answer == tokenizer.decode(said[:last], skip_special_tokens=True).strip()


@pytest.mark.parametrize("given", ["2", [2, "x"], True, {"a": 1}])
def test_stop_tokens_that_are_no_ids_are_one_clear_error(tmp_path, given):
    folder = write_base(tmp_path / "base", generation={"eos_token_id": given})
    with pytest.raises(ModelError, match="eos_token_id is"):
        add_stop_tokens(folder, [STOP], base=folder)


DONE = CHATML.replace("<|im_end|>", "<|done|>")


@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_token_beyond_the_embedding_is_refused_by_name(tmp_path, verb):
    base = write_base(tmp_path / "base", generation=None, template=DONE, special=("<|done|>",))
    recipe = write_recipe(tmp_path, base)
    run_dir = ["--run-dir", tmp_path / "run"] if verb == "train" else []
    done = run_cli(verb, recipe, *run_dir)
    assert done.code == 2 and "Traceback" not in done.stderr
    assert "'<|done|>' has the id 320" in done.stderr and "320 rows" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_surplus_token_that_nothing_uses_does_no_harm_until_it_is_asked(tmp_path):
    base = write_base(tmp_path / "base", generation=None, special=("<|spare|>",))
    recipe = write_recipe(tmp_path, base)
    assert train_cli(recipe, tmp_path / "run", *SHORT).code == 0
    assert run_cli("ask", tmp_path / "run", "say").code == 0
    asked = run_cli("ask", tmp_path / "run", "say <|spare|>")
    assert asked.code == 2 and "'<|spare|>' has the id 320" in asked.stderr
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "<|spare|>", "completion": "no"}) + "\n")
    scored = run_cli("eval", tmp_path / "run", "--data", tmp_path / "other.jsonl")
    assert scored.code == 2 and "'<|spare|>' has the id 320" in scored.stderr


def test_new_tokens_beside_surplus_ones_are_one_id_trained_merged_and_answered(tmp_path):
    """The surplus token lies between the base's rows and the new token's, so it gets a row too."""
    base = write_base(tmp_path / "base", generation=None, special=("<|spare|>",))
    recipe = write_recipe(tmp_path, base, completion="<|yes|>")
    done = train_cli(recipe, tmp_path / "run", *SHORT, "--set", 'data.special_tokens=["<|yes|>"]')
    assert done.code == 0, done.stderr
    merged = run_cli("merge", tmp_path / "run")
    assert merged.code == 0, merged.stderr
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "run" / "merged"))
    assert model.get_input_embeddings().weight.shape[0] == 322
    scores = [
        run_cli("eval", tmp_path / "run", "--which", which, "--json").json["loss"] for which in ("adapter", "merged")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=0.02), "both count the same labels"


def test_an_answer_keeps_the_tokens_that_answers_may_say():
    tokenizer = make_tokenizer(special_tokens=("<|yes|>",))
    ids = tokenizer("<|im_start|><|yes|> it is")["input_ids"]
    for own, said in ((("<|yes|>",), "<|yes|> it is"), ((), " it is")):
        template = ChatTemplate(tokenizer, Vocabulary(own))
        assert answer_tokenizer(tokenizer, template).decode(ids, skip_special_tokens=True) == said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ('["<|t|>","<|t|>"]', '"<|t|>" more than once'),
        ('["a","b","a","b"]', '"a" and "b" more than once'),
        ('[""]', 'got [""]'),
        ('[" "]', 'got [" "]'),
        ("[1]", "got [1]"),
        ("[null]", "got [null]"),
    ],
)
def test_special_tokens_that_are_repeated_blank_or_no_text_are_refused_with_their_line(tmp_path, given, said):
    (tmp_path / "r.yaml").write_text(f"method: qlora\ndata:\n  special_tokens: {given}\n")
    with pytest.raises(RecipeError) as found:
        load_recipe(tmp_path / "r.yaml", files_must_exist=False)
    assert "line 3" in str(found.value) and said in str(found.value)
