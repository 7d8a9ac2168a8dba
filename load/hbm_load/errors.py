"""What can be wrong with a workload."""


class LoadError(Exception):
    """Base of the errors of this package; the message is one line and says what to do."""


class ScenarioError(LoadError):
    """A scenario file is missing, not YAML or breaks the schema."""


class LogError(LoadError):
    """A user's log cannot be turned into a trace at all (single bad lines are only counted)."""


class ClientError(LoadError):
    """The load generator cannot start: bad target address or no usable requests."""
