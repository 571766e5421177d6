"""The report of a run: complete when the run is, readable when it is not, and harmless whatever the data say."""

import json

import pytest

from qlora_lite import show
from qlora_lite.errors import RunError
from tests.show.parsed import Parsed
from tests.show.run_files import write_run


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path / "run-1")


def report(run_dir):
    return Parsed(show.render_report(run_dir))


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_page_opens_with_what_was_trained_how_well_it_answers_and_what_it_took(run_dir):
    words = report(run_dir).words
    opening = words[: words.index("Scores and answers")]
    for expected in (
        "smollm2-135m, fine-tuned with QLoRA",
        "trained further on 600 examples in 60 steps",
        "Of 100 test questions held out of training, it now answers 49.0% word for word right",
        "before training it was 6.0%",
        "359 MiB measured; saves 2.08 GiB (86%) against full fine-tuning",
        "3 min 34 s 1 min 58 s of it training",
    ):
        assert expected in opening, expected


def test_a_whole_run_has_every_section(run_dir):
    page = report(run_dir)
    for expected in (
        "exact match share of answers that match an accepted answer word for word",  # a term is explained where it first appears
        "exact match 6.0 49.0 +43.0",
        "untrained: exact match 6.0 41.5 +35.5",
        "What is the capital of Norway? base model (before) The capital is a city in Norway that tuned model (after) right Oslo",
        "partly right, F1 67",
        "activations 74 MiB 70 MiB -4 MiB",
        "peak 368 MiB 359 MiB -9 MiB",
        "backward gradients flow back through the layers 368 MiB 359 MiB -9 MiB",
        "layer 29 240 MiB – 260 MiB –",
        "Retried: a micro-batch of 4096 tokens did not fit; 2048 did",
        "QLoRA saves 2.07 GiB (85%) against full fine-tuning, which would need 2.43 GiB",
        "Dots: validation loss, on examples not used for training; lowest 0.726 after step 60, 0.726 at the end.",
        "training 1 min 58 s 55%",
        "everything else 6.0 s 3%",
        "total 3 min 34 s 100%",
        "adapter/ the trained change of the base model 29.3 KiB",
        "checkpoints/step-000050/ a state to resume training from 8.79 KiB",
        "whole model in 16 bits, for use 257 MiB 2.51 GiB",
        "cpu: torch finds no CUDA device",
        "in general the recipe was made for another card",
        "A step takes about 1.33 times as long",
        "method: qlora",
        "arithmetic error 0.010%",
        "versions torch 2.13.0",
    ):
        assert expected in page.words, expected
    assert "could not be read" not in page.words


def test_nothing_in_the_data_becomes_a_tag_or_a_link(run_dir):
    html = show.render_report(run_dir)
    page = Parsed(html)
    assert not {"script", "img", "link", "iframe", "object", "form"} & set(page.tags)
    names = {name for _, attributes in page.elements for name in attributes}
    assert not {"src", "onerror", "onload"} & names
    assert all(link["href"].startswith("#") for link in page.all("a"))
    assert "\x1b" not in html
    assert "<script>alert(1)</script>" in page.words  # it is there, as text


def test_answers_without_those_of_the_base_stand_beside_what_counts_as_right(run_dir):
    file = run_dir / "predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps({k: v for k, v in line.items() if k != "base_prediction"}) for line in lines))
    words = report(run_dir).words
    assert "base model (before)" not in words
    assert "What is the capital of Norway? tuned model (after) right Oslo accepted answers Oslo" in words


def test_a_long_answer_is_cut(run_dir):
    (run_dir / "predictions.jsonl").write_text(json.dumps({"question": "q", "prediction": "word " * 1000, "gold": []}))
    assert "word word …" in report(run_dir).words
    assert report(run_dir).words.count("word") < 200


def test_validation_losses_are_dots_over_the_loss_and_rate_and_norm_have_curves(run_dir):
    page = report(run_dir)
    assert page.tags.count("polyline") == 5 and page.tags.count("circle") == 3


def test_a_run_without_validation_has_no_dots(run_dir):
    lines = [json.loads(line) | {"eval_loss": None} for line in (run_dir / "steps.jsonl").read_text().splitlines()]
    (run_dir / "steps.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = report(run_dir)
    assert "circle" not in page.tags and "Dots" not in page.words


def test_plain_text_has_a_loss_and_no_answers(run_dir):
    for name in ("predictions.jsonl", "merge.json"):
        (run_dir / name).unlink()
    change(run_dir / "eval.json", before={"loss": 2.0}, after={"loss": 1.0, "exact_match": None}, groups={})
    words = report(run_dir).words
    assert "Its loss on test texts held out of training is 1.000, 2.000 before training" in words
    assert "Loss 2.000 to 1.000" in words and "exact match" not in words and "side by side" not in words


def test_time_without_phases_is_training_and_the_rest(run_dir):
    change(run_dir / "train.json", phases_s=None)
    assert "training 1 min 58 s 55% everything else 1 min 36 s 45% total" in report(run_dir).words


def test_the_plan_stands_in_for_a_missing_measurement(run_dir):
    (run_dir / "memory.json").unlink()
    (run_dir / "train.json").unlink()
    words = report(run_dir).words
    assert "368 MiB planned; saves 2.07 GiB (85%) against full fine-tuning" in words


def test_an_empty_run_directory_still_gives_a_page(tmp_path):
    page = report(tmp_path)
    assert "no results yet" in page.words and f"Run {tmp_path.name}" in page.words


def test_damaged_files_are_named_and_the_rest_is_shown(run_dir):
    (run_dir / "eval.json").write_text('{"before": ')
    (run_dir / "plan.json").write_text("[" * 100_000)
    (run_dir / "steps.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo'
    )
    (run_dir / "predictions.jsonl").write_bytes(b"\xff\xfe")
    page = report(run_dir)
    problems = page.words[page.words.rindex("Files that could not be read") :]
    for name in ("eval.json", "plan.json", "steps.jsonl line 4", "predictions.jsonl"):
        assert name in problems
    assert "polyline" in page.tags and "nan" not in page.words.lower()


@pytest.mark.parametrize(
    "document",
    [
        [],
        3,
        {"before": 3, "after": [1], "groups": {"x": 3}},
        {"before": {"f1": "high"}, "phases_s": {"training": None}, "wall_s": "long"},
        {"parts": {"weights_bytes": 3}, "phases": [], "timeline": [{"bytes": "x"}, 3, {"phase": [], "bytes": 1}], "retries": 3},
        {"timeline": [{"phase": [], "layer": {}, "bytes": 1}, {"phase": "x", "layer": 3, "bytes": -1}], "peak_bytes": 3},
        {"methods": {"qlora": 3, "mine": {"parts": {"x": 1}}}, "settings": {"method": []}, "reasons": [1, None], "concessions": [3]},
        {"methods": {"qlora": {"peak_bytes": 0, "parts": {"weights_bytes": -5}}}, "checkpoint_bytes": {"full": "x"}},
        {"budget_bytes": -1, "peak_bytes": {"planned": 0, "measured": 0}, "parts": {"weights_bytes": {"planned": 0}}},
    ],
)  # fmt: skip
def test_files_of_another_shape_are_no_error(run_dir, document):
    for name in ("eval.json", "memory.json", "plan.json", "merge.json", "env.json", "train.json"):
        (run_dir / name).write_text(json.dumps(document))
    for name in ("steps.jsonl", "predictions.jsonl"):
        (run_dir / name).write_text(json.dumps(document))
    report(run_dir)


def test_links_in_a_run_are_not_followed(run_dir, tmp_path):
    (tmp_path / "elsewhere").write_bytes(bytes(10 * 2**20))
    (run_dir / "adapter" / "link").symlink_to(tmp_path / "elsewhere")
    assert "adapter/ the trained change of the base model 29.3 KiB" in report(run_dir).words


def test_a_missing_run_directory_is_the_users_to_mend(tmp_path):
    with pytest.raises(RunError, match="no such run directory"):
        show.render_report(tmp_path / "nowhere")
