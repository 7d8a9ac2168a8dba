"""What can go wrong in the pool. Wrong configuration is a `ValueError` (pydantic), raised early."""


class PoolError(Exception):
    """Base of the errors below."""


class ArenaMemoryError(PoolError, MemoryError):
    """The arena could not be reserved; the message says what was needed, what there is, what to
    change."""


class ExtentError(PoolError, ValueError):
    """An extent id that the caller does not own, or that does not exist, was handed back."""


class HandleError(PoolError, ValueError):
    """A KV handle was used after commit or abort, or is of another cache."""


class RowStoreError(PoolError):
    """Rows could not be read or written; the message names the store, the rows and the reason."""
