"""The report of a run: complete when the run is, readable when it is not, and harmless whatever the data say."""

import json
from html.parser import HTMLParser

import pytest

from qlora_lite import show
from qlora_lite.errors import RunError

EVIL = "<script>alert(1)</script><img src=http://x/y onerror=z>\x1b[2J"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run-1"
    folder.mkdir()
    files = {
        "eval.json": {
            "before": {"exact_match": 6.0, "f1": 28.1, "loss": 2.3},
            "after": {"exact_match": 49.0, "f1": 66.2, "loss": 0.5},
        },
        "memory.json": {
            "columns": {"QLoRA, measured": {"weights_bytes": 2**30}, "full": {"weights_bytes": 4 * 2**30}},
            "totals": {"QLoRA, measured": 2**30, "full": 4 * 2**30},
        },
        "plan.json": {"reasons": [f"model.dtype = bf16: {EVIL}"]},
        "merge.json": {"adapter_effect": 0.1, "arithmetic_ratio": 1e-4},
        "env.json": {"versions": {"torch": "2.13.0"}, EVIL: EVIL},
    }
    for name, document in files.items():
        (folder / name).write_text(json.dumps(document))
    (folder / "recipe.yaml").write_text(f"method: qlora # {EVIL}\n")
    (folder / "predictions.jsonl").write_text(
        json.dumps({"id": "1", "question": EVIL, "answers": ["Oslo", EVIL], "after": EVIL}) + "\n"
    )
    steps = [
        {
            "step": step,
            "loss": 3 / step,
            "learning_rate": 1e-3 / step,
            "grad_norm": 0.5,
            "eval_loss": 2.5 - step / 20 if step % 10 == 0 else None,
            "step_s": 2.0,
            "num_examples": 8,
            "num_label_tokens": 50,
        }
        for step in range(1, 30)
    ]
    (folder / "steps.jsonl").write_text("\n".join(json.dumps(step) for step in steps))
    return folder


def test_a_whole_run_has_every_section(run_dir):
    path = show.write_report(run_dir)
    words = " ".join(Page(path.read_text()).words)
    assert path == run_dir / "report.html"
    for expected in (
        "Scores",
        "+43.0",
        "Loss",
        "Memory",
        "saves 3 GiB (75%) against full",
        "Proof",
        "0.010%",
        "method: qlora",
        "Oslo",
        "2.13.0",
        "Learning rate and gradient norm",
        "Dots: validation loss, lowest 1.500 after step 20, at the end 1.500",
    ):
        assert expected in words, expected
    assert "could not be read" not in words
    assert sorted(file.name for file in run_dir.iterdir() if "report" in file.name) == ["report.html"]


def test_validation_losses_are_dots_over_the_loss_and_each_rate_has_its_curve(run_dir):
    page = Page(show.write_report(run_dir).read_text())
    assert page.tags.count("svg") == 3 and page.tags.count("polyline") == 5
    assert page.tags.count("circle") == 2


def test_a_run_without_evaluations_has_no_dots(run_dir):
    lines = [json.loads(line) | {"eval_loss": None} for line in (run_dir / "steps.jsonl").read_text().splitlines()]
    (run_dir / "steps.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = Page(show.write_report(run_dir).read_text())
    assert "circle" not in page.tags and "Dots" not in " ".join(page.words)


def test_nothing_in_the_data_becomes_a_tag_or_a_link(run_dir):
    html = show.write_report(run_dir).read_text()
    page = Page(html)
    assert not {"script", "img", "link", "iframe", "a", "object"} & set(page.tags)
    assert not {"src", "href", "onerror", "onload"} & set(page.attributes)
    assert "\x1b" not in html
    assert "<script>alert(1)</script>" in "".join(page.words)  # it is there, as text


def test_an_empty_run_directory_still_gives_a_page(tmp_path):
    assert "no results yet" in show.write_report(tmp_path).read_text()


def test_damaged_files_are_named_and_the_rest_is_shown(run_dir):
    (run_dir / "eval.json").write_text('{"before": ')
    (run_dir / "steps.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo'
    )
    (run_dir / "predictions.jsonl").write_bytes(b"\xff\xfe")
    page = Page(show.write_report(run_dir).read_text())
    words = " ".join(page.words)
    for name in ("eval.json", "steps.jsonl line 4", "predictions.jsonl"):
        assert name in words
    assert "svg" in page.tags and "nan" not in words.lower()


@pytest.mark.parametrize(
    "document", [[], 3, {"before": 3, "after": [1]}, {"groups": {"x": 3}}, {"before": {"f1": "high"}}]
)
def test_files_of_another_shape_are_no_error(run_dir, document):
    for name in ("eval.json", "memory.json", "plan.json", "merge.json", "env.json"):
        (run_dir / name).write_text(json.dumps(document))
    show.write_report(run_dir)


def test_the_plan_stands_in_for_a_missing_measurement(run_dir):
    (run_dir / "memory.json").unlink()
    methods = {
        "qlora": {"peak_bytes": 2**30, "parts": {"weights_bytes": 2**30}},
        "full": {"peak_bytes": 2**32, "parts": {}},
    }
    (run_dir / "plan.json").write_text(json.dumps({"methods": methods}))
    words = " ".join(Page(show.write_report(run_dir).read_text()).words)
    assert "QLoRA, planned" in words and "saves 3 GiB (75%) against full fine-tuning, planned" in words


def test_a_missing_run_directory_is_the_users_to_mend(tmp_path):
    with pytest.raises(RunError, match="no such run directory"):
        show.write_report(tmp_path / "nowhere")
