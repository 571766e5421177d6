"""Calls into libraries that read what somebody else wrote: whatever they raise is one clear error about the file.

What a parser says of a damaged file is of any kind (tokenizers raises plain `Exception`, transformers AttributeError, Arrow OverflowError),
and a list of kinds is never complete. So every kind counts, but only inside such a call: our own code stays outside of the block.

Surprising: a panic of a library in Rust is no Exception in Python (pyo3's PanicException is a BaseException), and stands for one here.
"""

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_lite.device.out_of_memory import is_out_of_memory
from qlora_lite.errors import UserError

_LONGEST = 300
_OURS = str(Path(__file__).parent) + os.sep
_MODELS_CODE = f"{os.sep}transformers{os.sep}"
# A dispatch mode stands between an operator and whoever called it; an error of the operator is its caller's.
_BETWEEN = tuple(_OURS + name for name in ("memory/ledger.py", "memory/meta_operators.py"))
_OF_OPERATORS = (RuntimeError, IndexError, ValueError, TypeError)  # NotImplementedError is a RuntimeError


@contextmanager
def foreign(
    make_error: Callable[[str], UserError], *, passes: Callable[[BaseException], bool] = lambda error: False
) -> Iterator[None]:
    """Raises `make_error(what the library said)` for whatever a library raises inside; errors for users, a lack of memory, and those for
    which `passes(error)` holds, pass.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if is_out_of_memory(error) or (not isinstance(error, Exception) and type(error).__name__ != "PanicException"):
            raise
        if passes(error):
            raise
        raise make_error(said_by(error)) from error


def is_of_our_code(error: BaseException) -> bool:
    """Whether an error that came out of a run of somebody's model is a bug of ours, and not for the model's values.

    Told by its traceback. Libraries (torch, peft, accelerate) do what they are asked to, so of the frames those of qlora_lite and of
    transformers count, and the innermost of them has raised the error or has called what did.
    """
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    if files and files[-1] in _BETWEEN and not isinstance(error, _OF_OPERATORS):
        return True
    callers = [file for file in files if (file.startswith(_OURS) and file not in _BETWEEN) or _MODELS_CODE in file]
    return bool(callers) and callers[-1].startswith(_OURS)


def said_by(error: BaseException) -> str:
    """The kind of an error and what it says, in one line and cut."""
    text = ": ".join([type(error).__name__, *([" ".join(str(error).split())] if str(error).strip() else [])])
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
