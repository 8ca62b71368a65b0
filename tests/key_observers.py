"""What the program makes of a configuration: each observer looks at one side of it, as cheaply as it can.

An observer takes a configuration and gives something that can be compared. It may write into the current directory.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax import train
from stackwise_jax.checkpoint import Store
from stackwise_jax.config import resolved_yaml, run_directory
from stackwise_jax.config.schema import StackWiseConfig
from stackwise_jax.data import load_tokenizer, training_texts
from stackwise_jax.engine import prepare, resident, setup
from stackwise_jax.engine import run as run_module
from stackwise_jax.engine.border import place_of
from stackwise_jax.engine.directory import check_directory, create_directory
from stackwise_jax.engine.dryrun import abstract_step
from stackwise_jax.engine.executor import make_executor
from stackwise_jax.engine.loop import Feed
from stackwise_jax.engine.planner import plan_run
from stackwise_jax.engine.prefix import Prefix, PrefixCache
from stackwise_jax.engine.programs import StepPrograms
from stackwise_jax.engine.resident import Resident, constants_of, step_spec
from stackwise_jax.engine.step import train_step
from stackwise_jax.engine.weights import EMBED, HEAD, Weights, path_items, stack_item
from stackwise_jax.engine.window import Window
from stackwise_jax.errors import RunError
from stackwise_jax.memory import Scratch
from stackwise_jax.memory import cache as cache_module
from stackwise_jax.memory.devices import machine_of


def built(config: StackWiseConfig) -> setup.Setup:
    """What a run of this configuration is made of."""
    return prepare(config, Path("no run directory"))


def fitting(config: StackWiseConfig) -> Any:
    """Where which phases do not fit the machine that is named, and the limits that are not this machine's."""
    memory = config.memory
    machine = machine_of(memory.device, memory.host, memory.disk, Path("no run directory"))
    short = [(s.place, s.limit) for phase in plan_run(built(config), machine).phases for s in phase.shortfalls]
    return short, machine.device.name


def refused(config: StackWiseConfig) -> Any:
    """What train says about a run that does not fit, before it does anything."""
    said: list[str] = []
    train.check_fits(built(config), SimpleNamespace(note=said.append))  # type: ignore[arg-type]
    return said


def directory(config: StackWiseConfig) -> Any:
    """Where the run lives."""
    return run_directory(config)


def text(config: StackWiseConfig) -> Any:
    """Training and held-out text, and the first batch."""
    parts = built(config)
    examples = parts.loader().batch(0)
    batch = [array.tolist() for array in examples]
    return parts.train.fingerprint, parts.valid.fingerprint, batch


def tokenizer(config: StackWiseConfig) -> Any:
    """Which ids it gives."""
    texts = lambda: training_texts(config.data, config.run.seed)
    return load_tokenizer(config.tokenizer, texts, None).fingerprint


def initial_values(config: StackWiseConfig) -> Any:
    """The computation that makes the first weights."""
    parts = built(config)
    weights = Weights(parts.rack, parts.placement, None, jax.random.key(0))
    items = (EMBED, HEAD, stack_item(0))
    return [jax.jit(functools.partial(weights._make, item)).lower(jax.random.key(0)).as_text() for item in items]


def steps(config: StackWiseConfig) -> Any:
    """The training step of each phase as it goes to the compiler."""
    parts, texts = built(config), []
    weights = Weights(parts.rack, parts.placement, None, jax.random.key(0))
    for phase in parts.plan.phases:
        window = Window(parts.rack, phase)
        spec = step_spec(parts.task(phase), phase, window)
        arguments = abstract_step(parts, weights, spec, phase, window)
        texts.append(jax.jit(functools.partial(train_step, spec)).lower(*arguments).as_text())
    return texts


def paths(config: StackWiseConfig) -> Any:
    """Where the tokens of each phase go and which parts learn."""
    parts = built(config)
    specs = [(p, step_spec(parts.task(p), p, Window(parts.rack, p))) for p in parts.plan.phases]
    learns = [(p.path, p.prefix, p.window, s.learns, s.train_embed, s.train_head) for p, s in specs]
    return learns, [len(stack.blocks) for stack in parts.rack.stacks], parts.plan.start


def phases(config: StackWiseConfig) -> Any:
    """The phases themselves: noise, adapters, how new stacks begin, what goes on over the borders."""
    return [repr(phase) for phase in built(config).plan.phases]


def sources(config: StackWiseConfig) -> Any:
    """Which weights of another run are taken, for which stacks, and whose adapters."""
    parts = built(config)
    origin, adapters = parts.origin, parts.adapters
    taken = origin and (str(origin.source.run_dir), origin.stacks, origin.source.versions)
    return taken, adapters and sorted(adapters.adapters)


def names(config: StackWiseConfig) -> Any:
    """What the phases are called in all that is written."""
    return [phase.name for phase in built(config).plan.phases]


def rates(config: StackWiseConfig) -> Any:
    """The learning rate that each step of each phase is fed, on the device."""
    parts, fed = built(config), []
    for phase in parts.plan.phases:
        feed = Feed(phase, parts.loader(), lambda *_: None, None, parts.placement, 0, 0)  # type: ignore[arg-type]
        fed.append([float(data.lr) for data in feed])
        feed.close()
    return fed


def cache_choice(config: StackWiseConfig) -> Any:
    """Whether and where each phase caches its prefix, and how many batches."""
    parts = built(config)
    cache = PrefixCache(config.cache, parts.placement, Path("unused"))
    choices = [cache.choose(phase, parts.loader(), parts.task(phase)) for phase in parts.plan.phases]
    return [(choice.use, choice.kind, choice.n_chunks) for choice in choices]


def cache_contents(config: StackWiseConfig) -> Any:
    """Where a cache that holds three batches puts them, and how far it reads ahead."""
    parts, depths = built(config), []
    phase, key = dataclasses.replace(parts.plan.phases[1], steps=3), jax.random.key(0)
    task, loader, weights = parts.task(phase), parts.loader(fixed=True), Weights(parts.rack, parts.placement, None, key)
    prefix = Prefix(weights, phase, task, parts.placement, key)
    for item in itertools.chain(*prefix.layers):
        weights.grow(item)
    with pytest.MonkeyPatch.context() as patch:
        real = cache_module.read_ahead
        patch.setattr(cache_module, "read_ahead", lambda *args: depths.append(args[2]) or real(*args))
        cache = PrefixCache(config.cache, parts.placement, Path("own"))
        cache.prepare(prefix, weights, phase, loader, cache.choose(phase, loader, task).kind, "data")
        held = cache.bytes
        list(cache.read([loader.batch_id(0)]))
        cache.close()
    return held, sorted(path.name for path in Path.cwd().iterdir() if path.is_dir()), depths


def resting(config: StackWiseConfig) -> Any:
    """Where weights, optimizer state and inputs of stacks rest in the last phase."""
    parts = built(config)
    phase, placement = parts.plan.phases[-1], parts.placement
    weights = Weights(parts.rack, placement, None, jax.random.key(0))
    weights.scratch = Scratch(Path("scratch"))
    for item in path_items(phase):
        weights.ensure(item, weights.master, place_of(config.memory, phase, item, cached=False, tied=False))
    constants = constants_of(placement, 0, 0, parts.tokenizer.token_bytes)
    executor = make_executor(config.memory, phase, parts.task(phase), weights, StepPrograms(placement), constants, None)
    if isinstance(executor, Resident):
        return "resident"
    held, inputs = executor.held, executor._lay_by([jnp.zeros((2, 8, 8))])
    trees = [*held.learning.values()], [*held.opt.values()], [*weights.trees.values()], inputs
    place = lambda x: "disk" if isinstance(x, np.ndarray) else x.sharding.memory_kind
    return [sorted({place(leaf) for leaf in jax.tree.leaves(tree)}) for tree in trees]


def devices(config: StackWiseConfig) -> Any:
    """The mesh, and what a group of processes is joined with."""
    joined: list = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.distributed, "initialize", lambda *args: joined.append(args))
        mesh = setup.start_devices(config).mesh
    return mesh.shape, joined


def resumed(config: StackWiseConfig) -> Any:
    """Whether a run that was begun may go on."""
    parts = prepare(config, Path("begun"))
    create_directory(parts)
    return check_directory(parts)


def behaviour(config: StackWiseConfig) -> Any:
    """What the train command leaves behind and says, with a step that learns nothing and is not finite from the third
    on, and a sampler that repeats what it is asked for."""
    batches: list[int] = []
    numbers = itertools.count()

    def step(state, frozen, data, constants):
        bad = max(0, next(numbers) - 1)
        return state, {"loss": 1.0, "bits_per_byte": 1.0, "accuracy": 0.0, "bad_steps": bad, "finite": bad == 0}

    def held_out(*args, **_):
        batches.append(sum(1 for arg in args if isinstance(arg, Iterator) for _ in arg))
        return {"loss": 1.0, "bits_per_byte": 1.0, "accuracy": 0.0}

    def sample(rack, params, tokenizer, prompt, *, max_tokens, **_):
        return f"{prompt} and {max_tokens} tokens"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepPrograms, "get", lambda *_: step)
        patch.setattr(resident, "compiled_bytes", lambda _: {"total": 0})
        patch.setattr(run_module, "held_out", held_out)
        patch.setattr("stackwise_jax.sampling.sample_text", sample)
        Path("run.yaml").write_text(resolved_yaml(config), encoding="utf-8")
        args = train.build_parser().parse_args(["--config", "run.yaml", "--run.dir", "here"])
        try:
            said = train.train(args)["sample"]
        except RunError as error:
            said = str(error)
    metrics = Path("here/metrics.jsonl").read_text(encoding="utf-8")
    store = Store(Path("here/checkpoints"), keep=9)
    progress = store.latest()
    kept = progress and {item: store.item_meta(item, v).get("format") for item, v in progress.versions.items()}
    named = progress and [sorted(result.get("versions", ())) for result in progress.results]
    return said, store.records(), metrics, batches, Path("here/tensorboard").exists(), kept, named
