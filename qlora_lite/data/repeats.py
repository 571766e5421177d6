"""Repeated rows: identical training rows, and held-out rows that are also training rows, whose scores measure memorization.

In: `Examples`, which store a hash of each row's content (`content_hash`: everything learned, independent of id, file and format).
Out: counts, and one sentence each. Reads no row again.
"""

from dataclasses import dataclass

import numpy as np

from qlora_lite.data.examples import Examples


@dataclass(frozen=True)
class Repeats:
    """Counts of the used rows of data.train and data.eval, without those beyond the recipe's limits."""

    num_rows: int
    num_repeated: int  # rows identical to an earlier one
    most_times: int  # occurrences of the most frequent row
    num_held_out: int = 0
    num_in_training: int = 0  # held-out rows that are also training rows

    @property
    def sentences(self) -> list[str]:
        sentences = []
        if self.num_repeated:
            sentences.append(
                f"data.train: {self.num_repeated:,} of {self.num_rows:,} rows are identical to an earlier one; one occurs "
                f"{self.most_times:,} times. Remove them unless they are intended"
            )
        if self.num_in_training:
            all_or_some = "all" if self.num_in_training == self.num_held_out else f"{self.num_in_training:,} of"
            sentences.append(
                f"data.eval: {all_or_some} {self.num_held_out:,} held-out rows are also training rows, so their scores measure "
                "memorization. Give data.eval rows that are not trained on"
            )
        return sentences


def find_repeats(train: Examples, held_out: Examples | None) -> Repeats:
    trained = _contents(train)
    unique, times = np.unique(trained, return_counts=True)
    num_repeated, most_times = len(trained) - len(unique), int(times.max(initial=0))
    if held_out is None:
        return Repeats(len(trained), num_repeated, most_times)
    scored = _contents(held_out)
    return Repeats(len(trained), num_repeated, most_times, len(scored), int(np.isin(scored, unique).sum()))


def _contents(examples: Examples) -> np.ndarray:
    """Return the hash of each row, once for all examples of one row, which are adjacent: pieces of a text, turns, weighted repeats."""
    is_first = np.ones(len(examples.contents), bool)
    is_first[1:] = examples.row_numbers[1:] != examples.row_numbers[:-1]
    return examples.contents[is_first]
