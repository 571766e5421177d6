"""Every error a user can meet, and the exit code the command line gives it.

    QloraLiteError                 base of all; never raised itself
      UserError            (2)     the user can mend it; the message says where, what, allowed, what to do
        RecipeError        (2)     one or more recipe keys are wrong; lists all of them, with file and line
        DataError          (2)     a data file cannot be read or holds too many bad rows
        ModelError         (2)     a base model is missing, damaged, or of a kind that is not supported
        RunError           (2)     a run directory is missing, unfinished, unwritable or in use
        TrainingStopped    (2)     the loss became NaN or diverged; names the step and the rows
      Interrupted     (130,143)    Ctrl-C or SIGTERM, after a checkpoint was written
      DoesNotFit           (3)     the plan needs more memory than the budget
      ProofFailed          (3)     a merged model is not the adapter model

Anything else that reaches the command line is our bug: exit code 1, with a traceback.
"""


class QloraLiteError(Exception):
    """Base of all errors that carry a message for people: what happened and, where it is kept apart, what to do about it."""

    exit_code = 1

    def __init__(self, what: str, *, advice: str = "") -> None:
        self.what = what
        super().__init__(f"{what}. {advice}" if advice else what)


class UserError(QloraLiteError):
    """Something the user can mend."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe is wrong. `problems` holds one line each, already with file line and key."""

    def __init__(self, where: str, problems: list[str]) -> None:
        self.where = where
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{where} has {count}", *(f"  {problem}" for problem in problems)]))


class DataError(UserError):
    """A data file cannot be used."""


class ModelError(UserError):
    """A base model cannot be used."""


class RunError(UserError):
    """A run directory cannot be used."""


class TrainingStopped(UserError):
    """Training stopped by itself: the loss is not a number any more, or far above where it began.

    `state_is_good` says whether the state is still that of the step before (NaN) or has gone astray (divergence).
    """

    def __init__(self, message: str, *, state_is_good: bool) -> None:
        super().__init__(message)
        self.state_is_good = state_is_good


class Interrupted(QloraLiteError):
    """Ctrl-C or SIGTERM: the step was finished and a checkpoint written."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class DoesNotFit(QloraLiteError):
    """The plan needs more memory than the budget."""

    exit_code = 3


class ProofFailed(QloraLiteError):
    """A merged model does not compute what the adapter model computes."""

    exit_code = 3
