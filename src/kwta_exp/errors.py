"""The exceptions that a user's mistake, or a damaged file, is reported with."""


class UserError(ValueError):
    """Something the user can put right: a bad value, a missing file, a checkpoint that does not fit.

    The message names the configuration key, gives the value, and says what was expected. The
    experiment shows it alone, without a traceback.
    """


class DamagedError(UserError):
    """A file of this project that is not as it was written; whoever can make it again may do so."""
