"""The compiled functions of a run, shared by all stacks of equal shape.

Everything that is computed goes through here, so that the cached and the recomputed prefix, training and evaluation
use the same machine code, and so that the number of compilations can be counted.

Legend: B batch, T sequence, D d_model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from stackwise_jax.engine.step import StepSpec, TaskSpec, TrainState, batch_sums, token_loss, train_step
from stackwise_jax.memory.placement import Placement
from stackwise_jax.model import Stack
from stackwise_jax.objectives import Examples

Tree = Any


def bare(stack: Stack) -> Stack:
    """The stack without what does not change its computation: stacks of equal shape become equal."""
    return Stack(blocks=stack.blocks, remat=stack.remat, parent=None)


@functools.partial(jax.jit, static_argnames="task")
def embed_examples(task: TaskSpec, embed: Tree, examples: Examples, key: jax.Array, visit: jax.Array) -> jax.Array:
    """Corrupt the examples and embed them: x_BTD."""
    x_BTD = task.embed(embed, task.batch(examples, key, visit))
    return jax.lax.with_sharding_constraint(x_BTD, task.placement.batch)


@functools.partial(jax.jit, static_argnames=("task", "stack"))
def run_stack(task: TaskSpec, stack: Stack, params: Tree, x_BTD: jax.Array, examples: Examples) -> jax.Array:
    """One stack without dropout: y_BTD."""
    y_BTD: Any = stack.apply(
        {"params": params},
        x_BTD,
        positions_BT=examples.positions_BT,
        segment_ids_BT=examples.segment_ids_BT,
        attention_mode=task.attention_mode,
    )
    return jax.lax.with_sharding_constraint(y_BTD, task.placement.batch)


@functools.partial(jax.jit, static_argnames="task")
def loss_sums(
    task: TaskSpec,
    head: Tree,
    embed: Tree,
    x_BTD: jax.Array,
    examples: Examples,
    key: jax.Array,
    visit: jax.Array,
    token_bytes_V: jax.Array,
) -> dict[str, jax.Array]:
    """The sums of `batch_sums` for one batch at the top of the path."""
    batch = task.batch(examples, key, visit)
    nll, correct = token_loss(task, head, embed, x_BTD, batch, train_kernel=False)
    return batch_sums(batch, nll, correct, token_bytes_V)


def compiled_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Device bytes of a compiled function: arguments, outputs that reuse no argument, temporaries, and their sum."""
    memory: Any = compiled.memory_analysis()
    arguments, temporaries = int(memory.argument_size_in_bytes), int(memory.temp_size_in_bytes)
    outputs = int(memory.output_size_in_bytes - memory.alias_size_in_bytes)
    return {
        "arguments": arguments,
        "outputs": outputs,
        "temporaries": temporaries,
        "total": arguments + outputs + temporaries,
    }


def _signature(tree: Tree) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, x.dtype, _where(x.sharding)) for x in leaves)


def _where(sharding: Any) -> Any:
    """What of a sharding a program is compiled for: on one device all ways to split are the same."""
    return sharding.memory_kind if sharding.num_devices == 1 else sharding


class StepPrograms:
    """Functions compiled ahead of time, one program per (function, settings, shapes)."""

    def __init__(self, placement: Placement):
        self._placement = placement
        self._compiled: dict[tuple, jax.stages.Compiled] = {}
        self.largest_bytes = 0  # on a device, of the programs compiled so far

    @property
    def compilations(self) -> int:
        return len(self._compiled)

    def get(self, spec: StepSpec, state: TrainState, *rest: Tree) -> jax.stages.Compiled:
        """The compiled step for arguments of these shapes and shardings (arrays or ShapeDtypeStructs with sharding).

        Call it as compiled(state, frozen, data, constants); `state` is donated.
        """
        spec = dataclasses.replace(spec, groups=tuple(bare(s) for s in spec.groups))
        shardings = (jax.tree.map(lambda x: x.sharding, state), self._placement.replicated)
        return self.program(train_step, (spec,), state, *rest, donate=(0,), out_shardings=shardings)

    def call(self, function: Callable, static: tuple, *args: Tree, donate: tuple[int, ...] = ()) -> Any:
        """function(*static, *args), compiled for arguments of these shapes and shardings.

        Args:
            static: hashable settings.
            donate: positions in `args` of what is given away.
        """
        return self.program(function, static, *args, donate=donate)(*args)

    def program(
        self, function: Callable, static: tuple, *args: Tree, donate: tuple[int, ...] = (), **how: Any
    ) -> jax.stages.Compiled:
        """What `call` calls; `args` may be ShapeDtypeStructs with shardings."""
        key = (function, static, donate, _signature(args))
        if key not in self._compiled:
            jitted = jax.jit(functools.partial(function, *static), donate_argnums=donate, **how)
            self._compiled[key] = jitted.lower(*args).compile()
            self.largest_bytes = max(self.largest_bytes, compiled_bytes(self._compiled[key])["total"])
        return self._compiled[key]
