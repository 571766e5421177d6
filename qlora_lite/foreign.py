"""Calls into libraries that parse files from other programs: any exception becomes one clear error about the file.

Parsers raise exceptions of any type for a damaged file (tokenizers a plain `Exception`, transformers AttributeError, Arrow OverflowError),
and no list of types is complete. So all types are converted, but only inside such a call: our own code stays outside the block.

Surprising: a panic in a Rust library is not an Exception in Python (pyo3's PanicException is a BaseException); it is converted too.
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
# A dispatch mode runs between an operator and its caller; an error of the operator belongs to the caller.
_BETWEEN = tuple(_OURS + name for name in ("memory/ledger.py", "memory/meta_operators.py"))
_OF_OPERATORS = (RuntimeError, IndexError, ValueError, TypeError)  # NotImplementedError is a RuntimeError


@contextmanager
def foreign(
    make_error: Callable[[str], UserError], *, passes: Callable[[BaseException], bool] = lambda error: False
) -> Iterator[None]:
    """Convert every exception inside the block to `make_error(description)`; UserError, out of memory and any error with
    `passes(error)` propagate unchanged.
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
        raise make_error(describe_error(error)) from error


def is_of_our_code(error: BaseException) -> bool:
    """Whether an error from running a user's model is our bug, and not caused by the values of the model.

    Decided from the traceback. Libraries (torch, peft, accelerate) only execute calls, so only frames of qlora_lite and
    transformers count; the innermost of them raised the error or called the code that did.
    """
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    if files and files[-1] in _BETWEEN and not isinstance(error, _OF_OPERATORS):
        return True
    callers = [file for file in files if (file.startswith(_OURS) and file not in _BETWEEN) or _MODELS_CODE in file]
    return bool(callers) and callers[-1].startswith(_OURS)


def describe_error(error: BaseException) -> str:
    """Return the type and message of an error in one line of at most 300 characters."""
    text = ": ".join([type(error).__name__, *([" ".join(str(error).split())] if str(error).strip() else [])])
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
