"""The one exception a user's mistake is reported with."""


class UserError(ValueError):
    """Something the user can put right: a bad value, a missing file, a checkpoint that does not fit.

    The message names the configuration key, gives the value, and says what was expected. The
    experiment shows it alone, without a traceback.
    """
