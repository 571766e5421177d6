"""Rows that are there twice: identical training rows, and held-out rows that were trained on, whose scores say what was learned by heart.

In: `Examples`, which keep a hash of each row's content (`content_hash`: all that is learned, whatever the row's id, file or format).
Out: counts, and a sentence each. No row is read again.
"""

from dataclasses import dataclass

import numpy as np

from qlora_lite.data.examples import Examples


@dataclass(frozen=True)
class Repeats:
    """Rows of data.train and data.eval as they are used, those beyond the recipe's limits not counted."""

    num_rows: int
    num_repeated: int  # rows that are identical to an earlier one
    most_times: int  # that one row is there
    num_held_out: int = 0
    num_in_training: int = 0  # held-out rows that are training rows too

    @property
    def sentences(self) -> list[str]:
        said = []
        if self.num_repeated:
            said.append(
                f"data.train: {self.num_repeated:,} of {self.num_rows:,} rows are identical to an earlier one; one is there "
                f"{self.most_times:,} times. Remove them unless they are meant"
            )
        if self.num_in_training:
            all_or_some = "all" if self.num_in_training == self.num_held_out else f"{self.num_in_training:,} of"
            said.append(
                f"data.eval: {all_or_some} {self.num_held_out:,} held-out rows are training rows too, so their scores say what was learned "
                "by heart. Give data.eval rows that are not trained on"
            )
        return said


def find_repeats(train: Examples, held_out: Examples | None) -> Repeats:
    trained = _contents(train)
    unique, times = np.unique(trained, return_counts=True)
    found = Repeats(len(trained), len(trained) - len(unique), int(times.max(initial=0)))
    if held_out is None:
        return found
    asked = _contents(held_out)
    return Repeats(found.num_rows, found.num_repeated, found.most_times, len(asked), int(np.isin(asked, unique).sum()))


def _contents(examples: Examples) -> np.ndarray:
    """The hash of each row, once for what one row made: pieces of a text, turns, and what a weight takes several times stand together."""
    is_first = np.ones(len(examples.contents), bool)
    is_first[1:] = examples.row_numbers[1:] != examples.row_numbers[:-1]
    return examples.contents[is_first]
