"""Where random numbers come from: a seed gives a root key, and each use of it draws from a stream of its own.

The same seed gives the same numbers on every machine. So the generator is named here and not taken from the
environment, and the settings of JAX on which its numbers depend have the values of `SETTINGS`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import jax

from stackwise_jax.errors import UsageError

GENERATOR = "threefry2x32"
# JAX_DEFAULT_MATMUL_PRECISION is not among them: it is a choice between speed and precision.
SETTINGS: dict[str, Any] = {
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_enable_x64": False,  # draws would be float64
    "jax_numpy_dtype_promotion": "standard",  # the strict ones refuse programs that are right
    "jax_numpy_rank_promotion": "allow",
}


class Stream(IntEnum):
    """What is drawn from a root key. A number is never used for anything else: the weights of older runs depend on it.

    Keys that are folded out of a stream are numbered where they are used (by block, by example, by step).
    """

    EMBED = 0  # initial values of the embedding
    HEAD = 1  # initial values of the head
    BLOCKS = 2  # initial values of the blocks; then by the block's place in the rack
    CORRUPTION = 3  # which tokens are hidden in training; then by example and visit
    DROPOUT = 4  # of blocks and adapters; then by phase and step
    RENEWED_ADAPTERS = 5  # initial values of adapters after a merge; then by merge, then one of the two below
    INSERTED = 6  # initial values of stacks that `convert` inserts; then by place, then BLOCKS
    ROUNDING = 7  # stochastic rounding of updates; then by phase and step
    SAMPLING = 8  # tokens of a generated text
    STACK_ADAPTERS = 16  # initial values of adapters of the name `stack`; then by block
    TRUNK_ADAPTERS = 17  # initial values of adapters of the name `trunk`; then by block


def root_key(seed: int | jax.Array) -> jax.Array:
    """The typed key of a seed, which may be traced."""
    return jax.random.key(seed, impl=GENERATOR)


def stream_key(root: jax.Array, stream: Stream) -> jax.Array:
    """The key of one stream of a root key."""
    return jax.random.fold_in(root, int(stream))


def fix_settings() -> None:
    """Give the settings of JAX the values of `SETTINGS`, whatever the environment says. For a process of our own."""
    for name, value in SETTINGS.items():
        if _setting(name, value) != value:
            jax.config.update(name, value)


def check_settings() -> None:
    """Refuse settings under which a seed gives other numbers. For a process that may be somebody else's.

    Raises:
        UsageError: one of `SETTINGS` has another value.
    """
    for name, value in SETTINGS.items():
        if (found := _setting(name, value)) != value:
            raise UsageError(
                f"{name} is {found}, under which the same seed gives other numbers; write "
                f"jax.config.update('{name}', {value!r}), and leave {name.upper()} out of the environment"
            )


def _setting(name: str, default: Any) -> Any:
    """A setting of JAX as it is; the default where this version of JAX has no such setting."""
    return getattr(jax.config, name, default)
