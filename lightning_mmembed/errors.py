"""The one exception that means "the input is wrong, and here is what to do"."""


class UserInputError(ValueError):
    """Wrong input from the user: a file, a record, an option or a checkpoint.

    The message names the file, line, key or argument, its value, why it cannot be used and what to do.
    The command-line programs print it alone, without a traceback, and exit with status 2.
    """
