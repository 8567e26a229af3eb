"""The one exception that means: the input was wrong, and this paragraph says how to put it right."""


class KdlibError(ValueError):
    """A user's mistake, told in one paragraph: what was expected, what was found, what to do.

    The notebook runner prints it without a traceback and exits with code 2.
    """
