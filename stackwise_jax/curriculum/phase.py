"""A phase: which stacks the tokens travel, what learns, on what task, for how long. Pure data, no JAX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stackwise_jax.config.schema import Dtype, NoiseSchedule, ObjectiveKind, OptimizerConfig
from stackwise_jax.errors import UsageError

AttentionMode = Literal["bidirectional", "causal"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is predicted from what; how much is hidden is the phase's noise."""

    kind: ObjectiveKind = "clm"


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How many tokens of a sequence are hidden.

    none: no token (clm). fixed: the share `low` (mlm). range: a share between `low` and `high`, drawn per sequence.
    elbo: t ~ U(0, 1), all shares, weighted so that the loss bounds the negative log-likelihood from above.
    `schedule` maps the drawn u in (0, 1) to a position within the range (range) or to the masked share (elbo).
    """

    kind: Literal["none", "fixed", "range", "elbo"] = "none"
    low: float = 0.0
    high: float = 1.0
    schedule: NoiseSchedule = "linear"

    def __post_init__(self):
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise UsageError(
                f"noise range {self.low}..{self.high} is impossible; write 0 <= objective.min_fraction <= "
                "objective.max_fraction <= 1"
            )
        if self.kind == "fixed" and not 0.0 < self.low < 1.0:
            raise UsageError(f"objective.mask_fraction {self.low} is impossible; write a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One entry of a curriculum. Prefix, window and suffix are derived from it, never stored.

    Raises:
        UsageError: the phase cannot be run; the sentence says what to write instead.
    """

    name: str
    path: tuple[int, ...]  # stack ids, input -> head; ids not yet in the rack are grown first
    train: frozenset[int] = frozenset()  # stacks whose full weights learn
    train_embed: bool = False
    train_head: bool = False  # final norm and head
    objective: Objective = field(default_factory=Objective)
    noise: Noise = field(default_factory=Noise)
    attention_mode: AttentionMode | None = "causal"  # None: each block's own
    frozen: Dtype = "fp32"  # how what does not learn is stored
    corruption: Literal["auto", "fixed", "fresh"] = "auto"  # fixed: seeded by example, so cacheable
    steps: int = 1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0

    def __post_init__(self):
        def refuse(why: str):
            raise UsageError(f"phase '{self.name}': {why}")

        if not self.path:
            refuse("the path is empty; name at least one stack")
        if len(set(self.path)) != len(self.path) or min(self.path) < 0:
            refuse(f"path {list(self.path)} names a stack twice or a negative id; name each stack once, from 0")
        if stray := sorted(self.train - set(self.path)):
            refuse(f"stacks {stray} learn but are not on the path {list(self.path)}; add them to path or drop them")
        if not (self.train or self.train_embed or self.train_head):
            refuse("nothing learns; name stacks in train, or set train_embed or train_head")
        if self.steps < 1:
            refuse(f"steps is {self.steps}; write at least 1")
        if self.objective.kind == "clm" and self.attention_mode == "bidirectional":
            refuse("objective clm sees its own targets under bidirectional attention; use attention_mode causal")
        if (self.objective.kind == "clm") != (self.noise.kind == "none"):
            refuse(f"objective {self.objective.kind} does not go with noise {self.noise.kind}")

    @property
    def first_learning(self) -> int:
        """Index into path of the first part that learns; 0 also when the embedding learns, len(path) for head only."""
        if self.train_embed:
            return 0
        return next((i for i, stack in enumerate(self.path) if stack in self.train), len(self.path))

    @property
    def prefix(self) -> tuple[int, ...]:
        """Stacks before the first thing that learns: no gradient reaches them."""
        return self.path[: self.first_learning]

    @property
    def window(self) -> tuple[int, ...]:
        """Stacks from the first that learns to the head: the gradient passes through all of them."""
        return self.path[self.first_learning :]
