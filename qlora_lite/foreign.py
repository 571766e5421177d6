"""Calls into libraries that read what somebody else wrote: whatever they raise is one clear error about the file.

What a parser says of a damaged file is of any kind (tokenizers raises plain `Exception`, transformers AttributeError, Arrow OverflowError),
and a list of kinds is never complete. So every kind counts, but only inside such a call: our own code stays outside of the block.

Surprising: a panic of a library in Rust is no Exception in Python (pyo3's PanicException is a BaseException), and stands for one here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qlora_lite.device.out_of_memory import is_out_of_memory
from qlora_lite.errors import UserError

_LONGEST = 300


@contextmanager
def foreign(make_error: Callable[[str], UserError]) -> Iterator[None]:
    """Raises `make_error(what the library said)` for whatever a library raises inside; errors for users, and a lack of memory, pass."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if is_out_of_memory(error) or (not isinstance(error, Exception) and type(error).__name__ != "PanicException"):
            raise
        raise make_error(said_by(error)) from error


def said_by(error: BaseException) -> str:
    """The kind of an error and what it says, in one line and cut."""
    text = ": ".join([type(error).__name__, *([" ".join(str(error).split())] if str(error).strip() else [])])
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
