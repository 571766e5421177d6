"""On which devices this program has been run, for `doctor` and the docs: a name stands here only with a stored document of the run."""

CARDS: dict[str, str] = {}  # a card's name -> the document in tools/results that tools/gpu_check wrote on it


def on_cards() -> str:
    """A sentence about cards."""
    if not CARDS:
        return "qlora_lite has been run on processors and, in its tests, on a stand-in for a card; on no real card yet"
    return f"qlora_lite has been run on: {', '.join(CARDS)}"
