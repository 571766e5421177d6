"""A page read back: its tags with their attributes, and its words."""

from html.parser import HTMLParser

VOID = {"meta", "br", "wbr", "rect", "line", "circle", "polyline"}


class Parsed(HTMLParser):
    """`elements` are (tag, attributes) in order; `words` is the text that a reader sees. Raises for a tag that closes another."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self._words: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] != "style":
            self._words.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self._words).split())

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every such element."""
        return [attributes for name, attributes in self.elements if name == tag]
