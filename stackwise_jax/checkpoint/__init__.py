"""Saved state of a run: items by version, progress records, the metrics file."""

from stackwise_jax.checkpoint.files import by_first_process, plain, writing
from stackwise_jax.checkpoint.location import Location, readable
from stackwise_jax.checkpoint.metrics_log import MetricsLog
from stackwise_jax.checkpoint.progress import Progress, check_goes_on
from stackwise_jax.checkpoint.store import Store

__all__ = ["Location", "MetricsLog", "Progress", "Store"]
__all__ += ["by_first_process", "check_goes_on", "plain", "readable", "writing"]
