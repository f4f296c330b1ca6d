"""The exceptions that mean something to the user: wrong input, and a run that had to stop."""

#: Exit status of a run that is to be started again (``EX_TEMPFAIL`` of ``sysexits.h``).
TRY_AGAIN = 75


class UserInputError(ValueError):
    """Wrong input from the user: a file, a record, an option or a checkpoint.

    The message names the file, line, key or argument, its value, why it cannot be used and what to do.
    The command-line programs print it alone, without a traceback, and exit with status 2.
    """

    def __init__(self, message: object = "") -> None:
        # A DataLoader raises what a worker raised with the worker's whole traceback for a message; ours ends it.
        _, raised, own = str(message).rpartition(f"{__name__}.UserInputError: ")
        super().__init__(own.rstrip("\n") if raised else message)


class RunStoppedError(RuntimeError):
    """A run that cannot go on, though its input can be used: a loss that is not finite, a process that died.

    The message says what happened where, what was kept and what to do.
    The command-line programs print it alone, without a traceback, and exit with status 1.
    """


def refuse_below_one(**settings: int | None) -> None:
    """Raise a :class:`UserInputError` that names the first setting below 1; ``None`` stands for no limit, and is fine.

    Example:
        >>> refuse_below_one(batch_size=8, tokens_per_batch=None)
    """
    for name, value in settings.items():
        if value is not None and value < 1:
            raise UserInputError(f"{name}={value} is too small; it must be at least 1")
