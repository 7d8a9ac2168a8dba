"""What can go wrong with a demo."""


class DemoError(Exception):
    """The demo cannot start or go on; the message is one line and says what to do."""


class ProcessFailed(DemoError):
    """A process did not become ready, or ended before it was told to."""
