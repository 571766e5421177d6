"""The cards on which this program has run, for `doctor` and the docs; each entry needs the stored document of its run."""

CARDS: dict[str, str] = {}  # a card's name -> the document in tools/results that tools/gpu_check wrote on it


def on_cards() -> str:
    """A sentence about the tested cards."""
    if not CARDS:
        return (
            "qlora_lite has run on processors and, in its tests, on a stand-in for a card, but not on a real card yet"
        )
    return f"qlora_lite has run on: {', '.join(CARDS)}"
