"""The kernels of all operations that are written in Pallas, for NVIDIA GPUs.

Everything that imports pallas stands in this folder, because its GPU back end changes from version to version: the
kernels' bodies (`bodies.py`) use nothing that belongs to one back end, `calls.py` names it. Nothing is imported before
a kernel is used.
"""

from stackwise_jax.kernels.pallas.entry import attention_pallas, feature_attention_pallas, obstacle, refusal

__all__ = ["attention_pallas", "feature_attention_pallas", "obstacle", "refusal"]
