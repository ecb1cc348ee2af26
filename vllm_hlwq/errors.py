"""The one exception of this package that a user is meant to read."""


class ExpertCacheError(ValueError):
    """A request that cannot be honoured: the message names the thing, its value and the remedy, in one line."""
