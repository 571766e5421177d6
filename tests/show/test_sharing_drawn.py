"""The drawing of what rows share: to scale, and only where something is shared."""

import re
from xml.etree import ElementTree

import pytest

from qlora_lite.show.sharing import MOST_BRANCHES, sharing, svg_tree

SHARING = {
    "tokens_alone": 4000, "tokens_packed": 1000, "factor": 4.0, "trunk_tokens": 150, "branch_tokens": 50, "rows_per_trunk": 5.2,
}  # fmt: skip


def rectangles(svg: str) -> list[tuple[str, float, float, float]]:
    """(class, x, y, width) of each."""
    found = []
    for rect in ElementTree.fromstring(svg).iter("rect"):
        x, width = (float(rect.attrib[key].removesuffix("%")) for key in ("x", "width"))
        found.append((rect.attrib["class"], x, float(rect.attrib["y"]), width))
    return found


def test_the_shared_text_is_drawn_with_every_example_above_and_once_below():
    found = rectangles(svg_tree(150, 50, 5))
    kinds = [kind for kind, *_ in found]
    trunk = kinds[0]
    assert kinds.count(trunk) == 5 + 1 and len(found) == 5 + 5 + 5 + 1 and len(set(kinds)) == 2
    assert "part-0" not in kinds
    widths = {kind: width for kind, *_, width in found}
    assert widths.pop(trunk) == pytest.approx(3 * next(iter(widths.values())), rel=1e-3)
    assert all(x + width <= 100.01 for _, x, _, width in found)
    lowest = [y for kind, _, y, _ in found if kind == trunk][-1]
    branches = [y for kind, x, y, _ in found if kind != trunk and x > 75]
    assert min(branches) < lowest < max(branches)


def test_few_branches_are_drawn_of_many():
    assert len(rectangles(svg_tree(150, 50, 90))) == 3 * MOST_BRANCHES + 1


def test_a_page_says_it_in_words_and_numbers():
    page = sharing({"sharing": SHARING})
    assert "4.00 times fewer" in page and "<svg" in page
    assert re.search(r"examples per shared text.*?5\.2", page, re.DOTALL)


@pytest.mark.parametrize("found", [None, {"tokens_alone": "many"}, SHARING | {"trunk_tokens": 0}])
def test_nothing_is_shown_where_nothing_is_shared(found):
    assert sharing({"sharing": found}) == sharing({}) == ""
