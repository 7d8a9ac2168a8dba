"""What the harness raises: each message is one clear line for a terminal."""


class HarnessError(Exception):
    """The harness cannot go on; the message says what was wrong and what to do."""


class ToolMissing(HarnessError):
    """A program that has to be built first is not in the cache."""
