"""A phase: which stacks the tokens travel, what learns, on what task, for how long. Pure data, no JAX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from stackwise_jax.config.schema import AdapterTarget, Format, NoiseSchedule, ObjectiveKind, OptimizerConfig, StackInit
from stackwise_jax.errors import UsageError

AttentionMode = Literal["bidirectional", "causal"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is predicted from what; how much is hidden is the phase's noise."""

    kind: ObjectiveKind = "clm"


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How many tokens of a sequence are hidden.

    none: no token (clm). fixed: the share `low` (mlm; diffusion at one level). range: a share between `low` and
    `high`, drawn per sequence. elbo: shares above `low` and up to `high`, weighted so that the losses of intervals that
    cover (0, 1] add up to an upper bound of the negative log-likelihood. `schedule` maps the drawn u in (0, 1) to a
    position within the range (range) or decides how likely each masked share is (elbo).
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
        if self.kind == "fixed" and self.low == 0.0:
            raise UsageError("a share of 0 hides nothing; write one above 0 and up to 1")
        if self.kind == "elbo" and self.low == self.high:
            raise UsageError(f"noise elbo from {self.low} to {self.high} is empty; write a lower and a higher share")


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """A LoRA adapter: `scale * x A B` is added to the products with the target matrices.

    alpha / rank is the scale; dropout: share of its input that is dropped in training.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[AdapterTarget, ...] = get_args(AdapterTarget)  # of them a block has those of its attention type

    def __post_init__(self):
        if self.rank < 1:
            raise UsageError(f"adapters.rank is {self.rank}; write at least 1")
        if not self.alpha > 0:
            raise UsageError(f"adapters.alpha is {self.alpha}; write a number above 0")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"adapters.dropout is {self.dropout}; write a share from 0 to below 1")
        if not self.targets:
            raise UsageError(f"adapters.targets is empty; name at least one of {', '.join(get_args(AdapterTarget))}")


@dataclass(frozen=True, kw_only=True)
class StackAdapter:
    """An adapter on a stack. A stack may have several, told apart by name."""

    stack: int
    name: Literal["stack", "trunk"]
    spec: AdapterSpec


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """Keeps what new stacks hand to the frozen suffix close to what the suffix was trained on.

    Adds weight * mean over tokens of |h - e|^2 / |e|^2 to the loss: h is the output of the last learning stack before
    the suffix, e the embedding of the same text at the suffix's own noise, by the embedding as it was when the phase
    began.
    """

    weight: float
    noise: Noise


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One entry of a curriculum. Prefix, window and suffix are derived from it, never stored.

    Raises:
        UsageError: the phase cannot be run; the sentence says what to write instead.
    """

    name: str
    path: tuple[int, ...]  # stack ids, input -> head; ids not yet in the rack are grown first
    train: frozenset[int] = frozenset()  # stacks whose full weights learn
    adapt: frozenset[int] = frozenset()  # stacks of which only the adapters learn
    train_embed: bool = False
    train_head: bool = False  # final norm and head
    objective: Objective = field(default_factory=Objective)
    noise: Noise = field(default_factory=Noise)
    attention_mode: AttentionMode | None = "causal"  # None: each block's own
    frozen: Format = "fp32"  # how what does not learn is stored
    frozen_stacks: tuple[Format, ...] = ()  # the same for each stack of the path; empty: frozen
    init: StackInit = "random"  # how stacks that are grown here begin
    adapters: tuple[StackAdapter, ...] = ()  # on the path in this phase; those that do not exist are made, at zero
    merge_adapters: bool = False  # when the phase begins: into the weights, and the adapters anew
    adapter_lr: float | None = None  # the highest of the phase; None: as everything else
    consistency: Consistency | None = None
    keep_optimizer: bool = False  # what learned before goes on with the optimizer state it had then
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
        if stray := sorted(self.adapt - set(self.path)):
            refuse(f"stacks {stray} are adapted but not on the path {list(self.path)}; add them to path or drop them")
        if both := sorted(self.adapt & self.train):
            refuse(f"stacks {both} stand in train and in adapt; name each in one of them")
        names = [(adapter.stack, adapter.name) for adapter in self.adapters]
        if len(set(names)) < len(names) or {stack for stack, _ in names} - set(self.path):
            refuse("an adapter is named twice or its stack is not on the path; name each (stack, name) once")
        if bare := sorted(self.adapt - {stack for stack, _ in names}):
            refuse(f"stacks {bare} are adapted and have no adapter; set adapters.rank or adapters.trunk_rank above 0")
        if not (self.train or self.adapt or self.train_embed or self.train_head):
            refuse("nothing learns; name stacks in train or adapt, or set train_embed or train_head")
        if self.frozen_stacks and len(self.frozen_stacks) != len(self.path):
            refuse(f"frozen_stacks has {len(self.frozen_stacks)} entries for {len(self.path)} stacks; write one each")
        if self.steps < 1:
            refuse(f"steps is {self.steps}; write at least 1")
        if self.objective.kind == "clm" and self.attention_mode == "bidirectional":
            refuse("objective clm sees its own targets under bidirectional attention; use attention_mode causal")
        if (self.objective.kind == "clm") != (self.noise.kind == "none"):
            refuse(f"objective {self.objective.kind} does not go with noise {self.noise.kind}")
        if self.consistency is not None and not self.suffix:
            refuse("consistency needs frozen stacks behind those that learn (prepend); leave it out")

    @property
    def learning(self) -> frozenset[int]:
        """Stacks of which something learns: weights or adapters."""
        return self.train | self.adapt

    def format_of(self, stack: int) -> Format:
        """How a stack of the path that does not learn is stored."""
        return self.frozen_stacks[self.path.index(stack)] if self.frozen_stacks else self.frozen

    @property
    def first_learning(self) -> int:
        """Index into path of the first part that learns; 0 also when the embedding learns, len(path) for head only."""
        if self.train_embed:
            return 0
        return next((i for i, stack in enumerate(self.path) if stack in self.learning), len(self.path))

    @property
    def prefix(self) -> tuple[int, ...]:
        """Stacks before the first thing that learns: no gradient reaches them."""
        return self.path[: self.first_learning]

    @property
    def window(self) -> tuple[int, ...]:
        """Stacks from the first that learns to the head: the gradient passes through all of them."""
        return self.path[self.first_learning :]

    @property
    def suffix(self) -> tuple[int, ...]:
        """Stacks behind the last that learns, if any does: the gradient flows through them."""
        last = max((i for i, stack in enumerate(self.path) if stack in self.learning), default=len(self.path))
        return self.path[last + 1 :]
