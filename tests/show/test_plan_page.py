"""The page of a plan says whether it fits, by how much, and what else would."""

import pytest

from qlora_lite import show
from qlora_lite.errors import RunError
from qlora_lite.show import rows
from qlora_lite.show.plan_page import render_plan
from tests.show.parsed import Parsed
from tests.show.run_files import GIB, MIB, make_plan


def test_a_plan_that_fits_says_so_first(tmp_path):
    path = show.write_plan_page(make_plan(), tmp_path / "plan.html")
    page = Parsed(path.read_text())
    for expected in (
        "It fits. QLoRA (base in 4 bits, only an adapter is trained) needs 368 MiB at its peak, and the budget is 2 GiB.",
        "Less than full fine-tuning 2.07 GiB (85%) which needs 2.43 GiB",
        "4.9 million the model has 135 million",
        "8,192 tokens",
        "Settings changed, one after the other, until it fits",
    ):
        assert expected in page.words, expected
    assert [file.name for file in tmp_path.iterdir()] == ["plan.html"]


def test_a_plan_that_does_not_fit_says_so_first():
    page = Parsed(render_plan(make_plan(budget_bytes=300 * MIB)))
    assert "It does not fit. QLoRA" in page.words


def test_each_cell_of_the_map_says_in_words_whether_it_fits():
    plan = make_plan()
    words = Parsed(render_plan(plan)).words
    num_fitting = sum(cell["fits"] for cell in plan["grid"])
    assert words.count("MiB fits") + words.count("GiB fits") == num_fitting > 0
    assert words.count("iB does not fit") == len(plan["grid"]) - num_fitting > 0


def test_a_plan_without_concessions_does_not_speak_of_any():
    words = Parsed(render_plan(make_plan(concessions=False))).words
    assert "changed" not in words and "times as long" not in words


@pytest.mark.parametrize("plan", [{}, {"model": "<b>x</b>", "grid": [3, {"batch": 1}], "methods": {"full": {}}}])
def test_what_a_plan_does_not_say_is_left_out(plan):
    assert Parsed(render_plan(plan)).all("b") == []


def test_a_plan_of_full_fine_tuning_saves_nothing_against_itself():
    plan = make_plan(budget_bytes=8 * GIB)
    plan["settings"] = {"method": "full", "train": {"optimizer": "adamw"}}
    words = Parsed(render_plan(plan)).words
    assert (
        "full (every weight is trained) needs 2.43 GiB" in words
        and "saves" not in words[: words.index("Sizes that fit")]
    )


def test_a_page_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    with pytest.raises(RunError, match=r"plan\.html: cannot be written \(No such file"):
        show.write_plan_page(make_plan(), tmp_path / "nowhere" / "plan.html")


def test_a_failed_write_leaves_the_old_page_and_nothing_else(tmp_path):
    (tmp_path / "plan.html").mkdir()  # a folder is in the way
    with pytest.raises(RunError, match="cannot be written"):
        show.write_plan_page(make_plan(), tmp_path / "plan.html")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.html"]


def test_a_measured_disk_adds_how_long_one_and_ten_checkpoints_take_to_write():
    plan = {"checkpoint_bytes": {"full": 2 * 10**9, "adapter": 10**6}, "disk_write_bytes_per_s": 2e8}
    assert rows.checkpoint_columns(plan)[-2:] == ["to write one", "to write ten"]
    assert [row[-2:] for row in rows.checkpoint_rows(plan)] == [("0.01 s", "0.05 s"), ("10 s", "1 min 40 s")]
    unknown = plan | {"disk_write_bytes_per_s": None}
    assert rows.checkpoint_columns(unknown) == ["checkpoint", "one", "ten"]
    assert all(len(row) == 3 for row in rows.checkpoint_rows(unknown))
