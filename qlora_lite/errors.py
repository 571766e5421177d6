"""All errors for users, with the exit codes of the command line.

    QloraLiteError                 base class; never raised directly
      UserError            (2)     the user can correct it; the message says where, what, what is allowed, what to do
        RecipeError        (2)     one or more recipe keys are wrong; lists all of them, with file and line
        DataError          (2)     a data file is unreadable or has too many bad rows
        ModelError         (2)     a base model is missing, damaged, or of an unsupported kind
        RunError           (2)     a run directory is missing, unfinished, unwritable or in use
        TrainingStopped    (2)     the loss became NaN or diverged; names the step and the rows
      Interrupted     (130,143)    Ctrl-C or SIGTERM, after a checkpoint was written
      DoesNotFit           (3)     the plan needs more memory than the budget
      ProofFailed          (3)     a merged model differs from the adapter model

Any other exception on the command line is our bug: exit code 1, with a traceback.
"""


class QloraLiteError(Exception):
    """Base class of all errors with a message for users. `what` is the message without the advice that may follow it."""

    exit_code = 1

    def __init__(self, what: str, *, advice: str = "") -> None:
        self.what = what
        super().__init__(f"{what}. {advice}" if advice else what)


class UserError(QloraLiteError):
    """An error that the user can correct."""

    exit_code = 2


class RecipeError(UserError):
    """An invalid recipe. Each of `problems` is one line of text, with file line and key."""

    def __init__(self, where: str, problems: list[str]) -> None:
        self.where = where
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{where} has {count}", *(f"  {problem}" for problem in problems)]))


class DataError(UserError):
    """An unusable data file."""


class ModelError(UserError):
    """An unusable base model."""


class RunError(UserError):
    """An unusable run directory."""


class TrainingStopped(UserError):
    """Training ended early: the loss became NaN, or rose far above its first value.

    `state_is_good` is true when the state is still that of the step before (NaN), false after divergence.
    """

    def __init__(self, message: str, *, state_is_good: bool) -> None:
        super().__init__(message)
        self.state_is_good = state_is_good


class Interrupted(QloraLiteError):
    """Ctrl-C or SIGTERM, after the step was finished and a checkpoint written."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class DoesNotFit(QloraLiteError):
    """A plan that needs more memory than the budget."""

    exit_code = 3


class ProofFailed(QloraLiteError):
    """A merged model whose results differ from the adapter model's."""

    exit_code = 3
