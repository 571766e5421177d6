"""One seed for each purpose, so that using one random stream more often does not change another."""

from hashlib import sha256


def purpose_seed(seed: int, purpose: str) -> int:
    """Return a 32-bit seed for `purpose` ("factors", "dropout", "rounding"), derived from the recipe's one seed."""
    return int.from_bytes(sha256(f"{seed}/{purpose}".encode()).digest()[:4], "big")
