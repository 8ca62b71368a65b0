"""Saved state of a run: items by version, progress records, the metrics file."""

from stackwise_jax.checkpoint.files import by_first_process, plain, writing
from stackwise_jax.checkpoint.location import Location, readable
from stackwise_jax.checkpoint.metrics_log import MetricsLog
from stackwise_jax.checkpoint.progress import Progress
from stackwise_jax.checkpoint.store import Store

__all__ = ["Location", "MetricsLog", "Progress", "Store", "by_first_process", "plain", "readable", "writing"]
