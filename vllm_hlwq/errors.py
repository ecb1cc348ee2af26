"""The exceptions of this package that a user is meant to read: one line that names thing, value and remedy."""


class ExpertCacheError(ValueError):
    """A request to the expert cache that cannot be honoured."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, converted or written."""


class KVCacheError(ValueError):
    """A request to the KV cache that cannot be honoured."""


class TraceError(ValueError):
    """A routing trace that cannot be read, recorded or replayed."""
