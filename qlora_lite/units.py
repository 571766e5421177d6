"""Formatting of bytes, seconds and row names for the screen, and parsing of sizes: bytes in code, GiB on screen."""

import re

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_LEAST_BYTES = 2**20  # of a memory budget: a smaller plain number is in GiB
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def row_in_words(row_id: str) -> str:
    """Name a row by its id: `row a7`; numbered rows keep their name, `row 3` or `more.jsonl row 3`."""
    return row_id if re.search(r"(^| )row \d+$", row_id) else f"row {row_id}"


def format_bytes(num_bytes: float) -> str:
    """`1536` -> `1.5 KiB`; three significant digits from KiB up, integers below."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 100 else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.3g} TiB" if size < 1000 else f"{size:,.0f} TiB"


def parse_bytes(text: str) -> int:
    """`24GiB`, `512 MiB`, `16GB` or a plain number of bytes -> bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match.group(2).upper() if match else None
    scale = _UNITS.get(unit, _DECIMAL.get(unit)) if unit is not None else None
    if match is None or scale is None:
        raise ValueError(f'expected a size such as "24GiB", "512MiB" or a number of bytes, got "{text}"')
    return int(float(match.group(1)) * scale)


def parse_budget(text: str) -> int:
    """As `parse_bytes`, but a small plain number is in GiB, as for graphics cards: `16` -> 16 GiB. Raises ValueError."""
    is_gib = re.fullmatch(r"\s*\d+(\.\d+)?\s*", text) is not None and float(text) < _LEAST_BYTES
    return parse_bytes(f"{text}GiB" if is_gib else text)


def format_seconds(seconds: float) -> str:
    """`75` -> `1 min 15 s`; `4000` -> `1 h 6 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
