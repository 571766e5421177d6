"""The documentation that ships with the package: the Markdown files of this folder, one page each.

`qlora-lite docs` lists them and `qlora-lite docs PAGE` prints one. A page's name is its file's name without `.md`; its title is its
first line. recipe-keys.md is generated from the recipe schema (recipe/keys_page.py); people write all others.
"""

from dataclasses import dataclass
from importlib import resources

from qlora_lite.errors import UserError
from qlora_lite.recipe.wording import near_names, quoted

# In the order in which a newcomer reads them; a page that is not named here follows, by its name.
READING_ORDER = (
    "install",
    "lora-step-by-step",
    "data",
    "planning",
    "fitting",
    "training",
    "adapters",
    "models",
    "recipe-keys",
    "commands",
    "python",
    "prefix-sharing",
    "recovery",
    "troubleshooting",
    "devices",
    "safety",
    "glossary",
    "finding-your-way",
)


@dataclass(frozen=True)
class Page:
    """One line of `qlora-lite docs`."""

    name: str
    title: str


def list_pages() -> tuple[Page, ...]:
    """Every page, in the order in which a newcomer reads them."""
    places = {name: place for place, name in enumerate(READING_ORDER)}
    names = sorted(_names(), key=lambda name: (places.get(name, len(places)), name))
    return tuple(Page(name, _title(read_page(name))) for name in names)


def read_page(name: str) -> str:
    """The Markdown text of a page, by its name with or without `.md`. Raises UserError with the nearest names."""
    stem, names = name.lower().removesuffix(".md"), _names()
    if stem not in names:
        near = near_names(stem, names)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"docs: unknown page {quoted(name)}; {hint}`qlora-lite docs` lists all pages")
    return (resources.files(__name__) / f"{stem}.md").read_text(encoding="utf-8")


def _names() -> list[str]:
    files = (file.name for file in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(".md") for name in files if name.endswith(".md"))


def _title(text: str) -> str:
    return text.split("\n", 1)[0].lstrip("# ").strip()
