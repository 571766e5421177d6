"""The reason for one automatic choice: the recipe's key, the value in words, and why."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """One choice. `str()` is its sentence: `key: value: why`, without the parts that are empty."""

    key: str  # such as `data.max_seq_length`; "" for a choice about the whole recipe
    value: str  # "" where `why` contains it
    why: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.key, self.decision) if part)

    @property
    def decision(self) -> str:
        """The value and why, without the key."""
        return f"{self.value}: {self.why}" if self.value else self.why
