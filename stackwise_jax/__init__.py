"""Train transformers larger than the accelerator, one stack at a time."""

import signal
import sys

__version__ = "0.2.0"

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # A command (`python -m stackwise_jax.train`) is being imported, which takes seconds. Ctrl-C now ends it without a
    # traceback; `reporting.run_command` catches it from then on.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
