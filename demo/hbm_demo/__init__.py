"""`hbm demo`: the whole system on one machine, live view, summary and report."""
