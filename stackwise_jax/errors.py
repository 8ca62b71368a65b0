"""The two kinds of failure a person can cause or meet; the commands turn them into one sentence and an exit code."""


class UsageError(ValueError):
    """The request is wrong (a key, a file, a value). The commands print the sentence and exit with 2."""


class RunError(RuntimeError):
    """The request was right and something failed on the way (disk full, damaged file). Exit code 1."""
