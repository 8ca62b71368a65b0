"""Noise schedules: how the hidden share of a sequence grows with u ~ U(0, 1), and how likely each count then is.

A schedule is a map m from [0, 1] onto [0, 1], increasing. `mass` is m^-1(last/total) - m^-1(first/total), the
probability that first < ceil(m(u) * total) <= last; it is written without the difference of two nearly equal numbers,
so that it holds to float32 precision at any sequence length, also for a single count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from stackwise_jax.config.schema import NoiseSchedule


class Schedule(Protocol):
    def share(self, u: jax.Array) -> jax.Array:
        """m(u), the hidden share, float32 in 0..1."""
        ...

    def mass(self, first: jax.Array, last: jax.Array, total: jax.Array) -> jax.Array:
        """P(first < ceil(m(u) * total) <= last), for whole numbers 0 <= first <= last <= total >= 1, all float32."""
        ...


@dataclass(frozen=True)
class Linear:
    """m(u) = u: every count is equally likely."""

    def share(self, u: jax.Array) -> jax.Array:
        return u

    def mass(self, first: jax.Array, last: jax.Array, total: jax.Array) -> jax.Array:
        return (last - first) / total


@dataclass(frozen=True)
class Cosine:
    """m(u) = 1 - cos(pi u / 2) (Chang et al. 2022, MaskGIT): lightly hidden sequences are more likely."""

    def share(self, u: jax.Array) -> jax.Array:
        return 2.0 * jnp.square(jnp.sin(0.25 * math.pi * u))

    def mass(self, first: jax.Array, last: jax.Array, total: jax.Array) -> jax.Array:
        # m^-1(x) = 4/pi asin(sqrt(x/2)), and asin a - asin b = asin((a^2 - b^2) / (a sqrt(1-b^2) + b sqrt(1-a^2))).
        a2, b2 = 0.5 * last / total, 0.5 * first / total
        below = jnp.sqrt(a2 * (1.0 - b2)) + jnp.sqrt(b2 * (1.0 - a2))
        apart = (0.5 * (last - first) / total) / jnp.where(last > 0, below, 1.0)
        return 4.0 / math.pi * jnp.arcsin(apart)


@dataclass(frozen=True)
class Exponential:
    """m(u) = (e^(k u) - 1) / (e^k - 1), k = 3: lightly hidden sequences are more likely.

    With k = 3 half of the draws hide less than 18 % of the tokens, and the weights of the bound span a factor of
    total / 20 instead of the linear schedule's total.
    """

    k: float = 3.0

    def share(self, u: jax.Array) -> jax.Array:
        return jnp.expm1(self.k * u) / math.expm1(self.k)

    def mass(self, first: jax.Array, last: jax.Array, total: jax.Array) -> jax.Array:
        c = math.expm1(self.k)
        return jnp.log1p(c * (last - first) / (total + c * first)) / self.k


SCHEDULES: dict[NoiseSchedule, Schedule] = {"linear": Linear(), "cosine": Cosine(), "exponential": Exponential()}
