"""Evidence: every way of choosing α on the same requests, and what a log would gain."""
