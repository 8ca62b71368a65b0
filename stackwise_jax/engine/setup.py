"""From a configuration to the parts of a run: tokenizer, text, rack, plan and devices. Writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax

from stackwise_jax.adapters import check_targets
from stackwise_jax.config import StackWiseConfig
from stackwise_jax.curriculum import Phase, Plan, make_plan
from stackwise_jax.data import Dataset, Loader, Tokenizer, load_datasets, load_tokenizer, training_texts
from stackwise_jax.engine.description import check_files, read_config, with_origin
from stackwise_jax.engine.entries import CONFIG
from stackwise_jax.engine.shape import rack_shape
from stackwise_jax.engine.source import Origin, Source, adapters_for, origin_for, saved_items
from stackwise_jax.engine.step import TaskSpec
from stackwise_jax.engine.weights import nearest_stack, stack_item
from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.memory import Placement, make_mesh
from stackwise_jax.memory.devices import claim_memory
from stackwise_jax.model import Rack, can_copy, create_rack_from_config, padded_vocab, regroup
from stackwise_jax.objectives import Vocab
from stackwise_jax.random_streams import check_settings


@dataclass(frozen=True)
class Setup:
    """Everything a run is made of, before a weight is allocated."""

    config: StackWiseConfig
    run_dir: Path
    tokenizer: Tokenizer
    rack: Rack
    plan: Plan
    placement: Placement
    train: Dataset
    valid: Dataset
    origin: Origin | None = None  # the run whose weights this one starts from
    adapters: Source | None = None  # the run whose adapters are put on this rack

    @property
    def vocab(self) -> Vocab:
        """What corruption and loss need to know of the tokenizer."""
        return vocab_of(self.tokenizer)

    def task(self, phase: Phase) -> TaskSpec:
        """What the phase asks of the model."""
        ends = self.rack.clone(stacks=self.rack.stacks[:1], parent=None)
        return TaskSpec(ends, phase.objective, phase.noise, phase.attention_mode, self.vocab, self.placement)

    def loader(self, *, fixed: bool = False) -> Loader:
        """The infinite stream of training batches; fixed: of batches that can be cached, see Loader."""
        data = self.config.data
        return Loader(self.train, data.batch_size, self.config.run.seed, shuffle=data.shuffle, fixed=fixed)


def vocab_of(tokenizer: Tokenizer) -> Vocab:
    """The tokenizer as objectives see it."""
    return Vocab(
        size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        unk_id=tokenizer.unk_id,
    )


def start_devices(config: StackWiseConfig) -> Placement:
    """Join the processes of a run (when there are several) and make the mesh.

    Raises:
        UsageError: the mesh does not fit the devices, the batch does not fit the mesh, or JAX has settings under which
            seeds give other numbers.
        RunError: the processes do not find each other.
    """
    check_settings()
    claim_memory()
    mesh_cfg = config.mesh
    if mesh_cfg.num_processes > 1 and not jax.distributed.is_initialized():
        if mesh_cfg.coordinator is None:
            raise UsageError("mesh.coordinator is missing; write host:port of process 0, the same for all processes")
        try:
            jax.distributed.initialize(mesh_cfg.coordinator, mesh_cfg.num_processes, mesh_cfg.process_id)
        except (RuntimeError, ValueError) as error:
            why = (str(error).splitlines() or ["no reason is given"])[0][:160].rstrip(".")
            raise RunError(
                f"process {mesh_cfg.process_id} of {mesh_cfg.num_processes} cannot join the run at mesh.coordinator "
                f"{mesh_cfg.coordinator} ({why}); start all processes with that address, which process 0 listens at"
            ) from error
    placement = Placement(make_mesh(mesh_cfg))
    placement.check_batch(config.data.batch_size)
    part = config.data.batch_size // config.optimizer.microbatches
    if part % placement.mesh.size:
        raise UsageError(
            f"optimizer.microbatches {config.optimizer.microbatches} leaves {part} sequences a part, which cannot be "
            f"split evenly over {placement.mesh.size} devices; write fewer microbatches or a larger data.batch_size"
        )
    return placement


def prepare(config: StackWiseConfig, run_dir: Path, rack: Rack | None = None) -> Setup:
    """Build the parts of a run. A run that has been begun knows where it started from: that may be left out.

    Args:
        rack: a rack built by hand (unlike stacks, frozen stacks); None: the one that the configuration describes.

    Raises:
        UsageError: anything in the configuration that cannot be run, named by key or file.
        RunError: the run directory holds a run of which a file was changed.
    """
    placement = start_devices(config)
    if (
        run_dir.is_dir() and check_files(run_dir) is not None and (run_dir / CONFIG).exists()
    ):  # before any of it is used
        config = with_origin(config, read_config(run_dir))
    seed = config.run.seed
    tokenizer = load_tokenizer(config.tokenizer, lambda: training_texts(config.data, seed), run_dir / "tokenizer")
    if rack is None:
        rack = create_rack_from_config(config, tokenizer.vocab_size)
    padded_vocab(rack.vocab_size, tokenizer.vocab_size, 1)
    plan = make_plan(config, rack_shape(rack, config.data))
    _check_attention(rack, plan)
    rack = regroup(rack, plan.stack_sizes)
    for adapter in (adapter for phase in plan.phases for adapter in phase.adapters):
        check_targets(rack.stacks[adapter.stack].blocks, adapter.spec)
    saved = saved_items(run_dir)
    origin, adapters = origin_for(config, rack, tokenizer, saved), adapters_for(config, rack, plan, saved)
    existing = {i for i in range(len(rack.stacks)) if stack_item(i) in saved}
    _check_copies(rack, plan, frozenset(origin.stacks if origin else existing))
    train, valid = load_datasets(config.data, tokenizer, seed)
    return Setup(config, run_dir, tokenizer, rack, plan, placement, train, valid, origin, adapters)


def _check_attention(rack: Rack, plan: Plan) -> None:
    """A phase that leaves attention to the blocks must not let a causal objective see its targets."""
    modes = {block.attention_mode for stack in rack.stacks for block in stack.blocks}
    for phase in plan.phases:
        if phase.attention_mode is None and phase.objective.kind == "clm" and modes != {"causal"}:
            raise UsageError(
                f"phase '{phase.name}': objective clm sees its own targets in bidirectional blocks; write "
                "objective.attention_mode causal, or build the rack of causal blocks"
            )


def _check_copies(rack: Rack, plan: Plan, existing: frozenset[int]) -> None:
    """A stack that is grown as a copy needs one beside it that has its shape."""
    existing = existing | plan.start
    for phase in plan.phases:
        before = [i for i in phase.path if i in existing]
        for index in phase.path:
            source = nearest_stack(phase.path, before, index)
            if index in existing or phase.init != "copy" or source is None:
                continue
            if not can_copy(rack.stacks[source], rack.stacks[index]):
                raise UsageError(
                    f"phase '{phase.name}': stack {index} cannot begin as a copy of stack {source}, which has another "
                    "shape; write curriculum.init random or zero, or make the stacks alike"
                )
        existing |= set(phase.path)
