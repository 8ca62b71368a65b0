"""Runs any list of phases; knows the name of no mode.

For each phase: 1. grow the stacks of the path that do not exist; 2. store what does not learn in the phase's frozen
format (its full-precision copy stays in the store), both in `border`; 3. cache or recompute the prefix; 4. learning
state = (step, learning trees, optimizer state), donated, the frozen trees beside it; 5. the loop of `loop.run_phase`;
6. write only what changed, drop optimizer and cache.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import jax

from stackwise_jax.checkpoint import Progress, plain
from stackwise_jax.curriculum import Phase, trained_apart
from stackwise_jax.engine import directory, entries
from stackwise_jax.engine.account import phase_flops_of, trainable_and_frozen
from stackwise_jax.engine.border import hand_over, keep_moments, open_phase, reference_embedding
from stackwise_jax.engine.events import NullReporter, Reporter, StopFlag
from stackwise_jax.engine.executor import Executor, make_executor, streams
from stackwise_jax.engine.heldout import held_out, held_out_batches
from stackwise_jax.engine.loop import Feed, run_phase
from stackwise_jax.engine.prefix import Prefix, PrefixCache
from stackwise_jax.engine.programs import StepPrograms
from stackwise_jax.engine.recorder import Recorder
from stackwise_jax.engine.resident import constants_of
from stackwise_jax.engine.setup import Setup
from stackwise_jax.engine.step import TaskSpec
from stackwise_jax.engine.weights import EMBED, HEAD, Weights, path_items, stack_item
from stackwise_jax.errors import RunError
from stackwise_jax.memory import Scratch, peak_device_bytes, peak_host_bytes
from stackwise_jax.random_streams import root_key

Tree = Any
HISTORY = 64  # points of the loss history kept with each item
FILL_NOTE_SECONDS = 10.0
AGREE_EVERY = 10  # steps between the moments at which several processes agree to stop


class Interrupted(RunError):
    """The run was asked to stop and has saved its state."""


@dataclasses.dataclass
class PhaseWork:
    """What exists only while a phase runs."""

    index: int
    phase: Phase
    task: TaskSpec
    feed: Feed
    token_bytes_V: jax.Array
    cached_batches: int | None  # None: the prefix is recomputed
    advanced_stacks: int | None
    trainable: int
    not_trained: int
    started: float  # perf_counter when this process took up the phase
    step_bytes: int = 0  # device bytes of the compiled step
    before: float = 0.0  # seconds in this phase by earlier processes
    stepping: float = 0.0  # seconds in the loop, by this process
    done: int = 0  # steps, by this process
    skipped: int = 0  # non-finite steps in this phase
    history: list = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Wall clock of the phase: placing, caching and compiling included, as is what earlier processes spent."""
        return self.before + time.perf_counter() - self.started


class Run:
    """One run, from where its directory stands to its end."""

    def __init__(self, setup: Setup, reporter: Reporter | None = None, stop: StopFlag | None = None):
        self.setup, self.config, self.phases = setup, setup.config, setup.plan.phases
        self.first = jax.process_index() == 0
        self.reporter: Reporter = reporter if reporter is not None and self.first else NullReporter()
        self.stop = stop or StopFlag()
        self.placement = setup.placement
        self.programs = StepPrograms(self.placement)
        self.loader = setup.loader()
        self.was_finished = False  # `train` found nothing left to do

    # The two ends of a run.

    def train(self) -> dict:
        """Train to the end and return the summary; continues what the run directory holds.

        Raises:
            UsageError: the directory belongs to another configuration, or the data changed.
            Interrupted: `stop` was set; everything is saved and the same call continues.
            RunError: the disk is full, a checkpoint is damaged, or too many steps in a row were not finite.
        """
        progress = self._open()
        self.was_finished = progress.finished
        if self.was_finished:
            self.reporter.note(f"{self.setup.run_dir} is finished; there is nothing left to do")
            self.recorder.close()
            return self._summary()
        n, loader = len(self.setup.train), self.loader
        self.reporter.note(
            f"{n} training sequences of {self.config.data.seq_len} tokens; an epoch uses all of them, in "
            f"{loader.n_batches} batches of {loader.batch_size}"
        )
        try:
            for index in range(progress.phase, len(self.phases)):
                self._phase(index, progress if index == progress.phase else None)
        finally:
            self.cache.close()
            self.recorder.close()
        return self._summary()

    def _open(self) -> Progress:
        run_dir, setup = self.setup.run_dir, self.setup
        self.scratch = Scratch(run_dir / entries.OFFLOAD)
        self.cache = PrefixCache(self.config.cache, self.placement, run_dir / entries.CACHE)
        for phase in self.phases:  # what cannot be cached as asked is refused now, not when its phase comes
            self.cache.choose(phase, self.loader, setup.task(phase))
        store = directory.open_store(setup)
        self.recorder = Recorder(run_dir, store, directory.fingerprints(setup))
        root = self.placement.put(root_key(self.config.run.seed), self.placement.replicated)
        self.weights = self.recorder.weights = Weights(setup.rack, self.placement, store, root)
        self.weights.scratch = self.scratch
        progress = store.latest() or self._begin()
        self.recorder.go_on_from(progress)
        if progress.number > 1 and not progress.finished:
            name = self.phases[progress.phase].name
            self.reporter.note(f"continuing {run_dir}: phase '{name}', step {progress.step}")
        return progress

    def _begin(self) -> Progress:
        """Write the items that exist before the first phase, one at a time, and the first progress record."""
        origin = self.setup.origin
        stacks = self.setup.plan.start | frozenset(origin.stacks if origin else ())
        for item in [EMBED, HEAD, *map(stack_item, sorted(stacks))]:
            tree = origin.load(item, self.weights.shapes(item, self.weights.master)) if origin else None
            if tree is None:
                self.recorder.grow(item, "start")
            else:
                self.recorder.keep(item, tree, "start")
            self.weights.drop(item)
        return self.recorder.commit(phase=0, step=0)

    def _summary(self) -> dict:
        summary: dict[str, Any] = {
            "run": str(self.setup.run_dir),
            "plan": self.config.curriculum.title,
            "phases": [{k: v for k, v in r.items() if k not in ("versions", "formats")} for r in self.recorder.results],
            **self._quality(),
            # None: not measured
            **{name: sum(r[name] or 0 for r in self.recorder.results) for name in ("tokens", "flops", "seconds")},
        }
        if self.first:
            text = json.dumps(plain(summary), indent=2) + "\n"
            entries.write(self.setup.run_dir / entries.SUMMARY, text)
        return summary

    def _quality(self) -> dict[str, float | None]:
        """Held-out loss at the end, None: not measured; of denoisers of intervals the sum of their partial bounds."""
        apart, results = trained_apart(self.phases), self.recorder.results
        partial = len(apart) > 1 and all(self.phases[i].noise.kind == "elbo" for i in apart)
        ends = [result for result in results if result["index"] in apart] if partial else results[-1:]
        figures = {name: [end[name] for end in ends] for name in ("held_out_loss", "bits_per_byte")}
        return {name: None if None in found else sum(found) for name, found in figures.items()}

    # One phase.

    def _phase(self, index: int, progress: Progress | None) -> None:
        start, started = progress.step if progress else 0, time.perf_counter()
        work, executor = self._set_up(index, start, started)
        if progress and start:
            work.before, work.skipped = progress.extra["seconds"], progress.extra["skipped"]
            work.history = list(progress.extra["history"])
            load = functools.partial(self.recorder.load_optimizer, progress)
            executor.resume(load, progress.step, progress.bad_steps)
        else:
            hand_over(executor, self.recorder, work.phase)
        learned = self._loop(work, executor, start)
        keep_moments(executor, self.recorder, self.phases, index, self._meta(work, work.phase.steps))
        del executor  # its optimizer state and frozen copies make room for the evaluation of the whole path
        self._finish_phase(work, learned)

    def _loop(self, work: PhaseWork, executor: Executor, start: int) -> dict[str, Tree]:
        """Train from step `start` to the end of the phase; returns the full trees of what learned."""
        feed = iter(work.feed)
        first = next(feed)
        executor.compile(first)
        work.step_bytes = executor.step_bytes
        try:
            run_phase(
                executor.step,
                itertools.chain([first], feed),
                range(start, work.phase.steps),
                before_step=lambda step, flush: self._before_step(work, executor, step, start, flush),
                on_metrics=lambda step, metrics, seconds: self._on_metrics(work, step, metrics, seconds),
            )
        finally:
            work.feed.close()
        return executor.learned()

    def _set_up(self, index: int, start: int, started: float) -> tuple[PhaseWork, Executor]:
        phase, weights, rack = self.phases[index], self.weights, self.setup.rack
        task = self.setup.task(phase)
        choice = self.cache.choose(phase, self.loader, task)
        corruption = "fixed" if choice.use or phase.corruption == "fixed" else "fresh"
        phase = dataclasses.replace(phase, corruption=corruption)
        origin = self.setup.adapters
        how = {"begins": not start, "cached": choice.use, "adapters": origin, "again": index + 1}
        open_phase(weights, self.recorder, phase, memory=self.config.memory, **how)
        reference = reference_embedding(weights, self.recorder, phase, begins=not start)
        constants = constants_of(self.placement, phase.seed, index, self.setup.tokenizer.token_bytes)
        prefix = Prefix(weights, phase, task, self.placement, constants["corruption_key"])
        loader, reason, advanced = self.loader, choice.reason, None
        if choice.use:
            data = f"{self.setup.train.fingerprint}/{self.config.run.seed}/{self.loader.batch_size}"
            tell = self._tell_filling(phase)
            loader = self.setup.loader(fixed=True)
            advanced = self.cache.prepare(prefix, weights, phase, loader, choice.kind, data, tell)
            reason += "; filled" if advanced is None else f"; advanced through {advanced} more stack(s)"
        else:
            self.cache.close()
        executor = make_executor(self.config.memory, phase, task, weights, self.programs, constants, reference)
        # A cached phase meets the same batches as the phases before it, any other goes on in the stream.
        offset = 0 if choice.use else sum(p.steps for p in self.phases[:index])
        feed = Feed(phase, loader, prefix, self.cache if choice.use else None, self.placement, offset, start)
        trainable, not_trained = trainable_and_frozen(rack, phase)
        work = PhaseWork(
            index=index,
            phase=phase,
            task=task,
            feed=feed,
            token_bytes_V=constants["token_bytes_V"],
            cached_batches=choice.n_chunks if choice.use else None,
            advanced_stacks=advanced,
            trainable=trainable,
            not_trained=not_trained,
            started=started,
        )
        info = {"steps": phase.steps, "start_step": start, "cache": reason}
        info |= {"trainable_params": trainable, "frozen_params": not_trained}
        self.reporter.phase_start(index, len(self.phases), phase, info)
        return work, executor

    def _tell_filling(self, phase: Phase) -> Callable[[int, int], None]:
        """Says now and then how far the cache of a phase is, and stops the run where that is asked for."""
        last = time.perf_counter()

        def tell(done: int, total: int) -> None:
            nonlocal last
            if jax.process_count() == 1 and self.stop.is_set():
                where = f"stopped while the cache of phase '{phase.name}' was filled"
                raise Interrupted(f"{where}; the same command continues {self.setup.run_dir}")
            if time.perf_counter() - last > FILL_NOTE_SECONDS:
                last = time.perf_counter()
                self.reporter.note(f"  cache of phase '{phase.name}': {done} of {total} batches")

        return tell

    # Called by the loop.

    def _before_step(self, work: PhaseWork, executor: Executor, step: int, start: int, flush) -> None:
        run = self.config.run
        stopping = self._agree_to_stop(step)
        if step > start:
            work.step_bytes = executor.step_bytes
            if run.eval_every and step % run.eval_every == 0:
                flush()
                self._report_held_out(work, step, self._held_out(work, *executor.evaluated()))
            if stopping or (run.save_every and step % run.save_every == 0):
                flush()
                self._save(work, executor, step)
        if stopping:
            raise Interrupted(
                f"stopped at phase '{work.phase.name}', step {step}; the same command continues {self.setup.run_dir}"
            )

    def _agree_to_stop(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self.stop.is_set()
        if step % AGREE_EVERY:
            return False  # asking the other processes waits for the device
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(self.stop.is_set()).any())

    def _on_metrics(self, work: PhaseWork, step: int, metrics: dict[str, float], seconds: float) -> None:
        run, phase = self.config.run, work.phase
        work.stepping += seconds
        work.done += 1
        finite = metrics.pop("finite") > 0
        work.skipped += not finite
        bad_steps = int(metrics.pop("bad_steps"))
        self.recorder.global_step = done = self.recorder.global_step + 1
        row: dict[str, Any] = {"phase": phase.name, "step": step, "global_step": done, **metrics}
        row |= {"lr": float(work.feed.rate(step)), "skipped": work.skipped}
        if step % run.log_every == 0 or step == phase.steps - 1 or not finite:
            self._log(row)
            work.history.append([done, metrics["loss"] if finite else None])
        tokens = self.loader.batch_size * self.config.data.seq_len
        left = sum(p.steps for p in self.phases[work.index :]) - step - 1
        row |= {
            "steps": phase.steps,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "seconds_left": left * work.stepping / work.done,
            "device_bytes": peak_device_bytes() or work.step_bytes,
            "host_bytes": peak_host_bytes(),
        }
        self.reporter.step(row)
        if bad_steps >= run.max_bad_steps:
            raise RunError(
                f"phase '{phase.name}', step {step}: loss or gradient was not finite {bad_steps} steps in a row; lower "
                "optimizer.lr or set optimizer.grad_clip, and start again in another run.dir (checkpoints stay)"
            )

    def _log(self, row: dict) -> None:
        """One line of metrics.jsonl: nothing in it depends on the clock, so a resumed run writes the same bytes."""
        self.recorder.log.append(row)

    def _save(self, work: PhaseWork, executor: Executor, step: int) -> None:
        extra = {"seconds": work.seconds, "skipped": work.skipped, "history": work.history}
        meta = self._meta(work, step)
        self.recorder.save_inside(executor.learned(), executor.opt, meta, extra, executor.bad_steps)

    def _meta(self, work: PhaseWork, step: int) -> dict:
        """What is written beside an item's arrays."""
        stride = -(-len(work.history) // HISTORY) or 1
        return {
            "phase": work.phase.name,
            "phase_index": work.index,
            "step": step,
            "format": self.weights.master,
            "loss_history": work.history[:-1:stride] + work.history[-1:],
        }

    # Held-out loss.

    def _held_out(self, work: PhaseWork, stacks: list, embed: Tree, head: Tree) -> dict[str, float]:
        run, setup = self.config.run, self.setup
        batches = held_out_batches(setup.valid, self.loader.batch_size, setup.tokenizer.pad_id, run.eval_batches)
        return held_out(work.task, stacks, embed, head, batches, work.token_bytes_V)

    def _report_held_out(self, work: PhaseWork, step: int, loss: dict[str, float]) -> None:
        row = {
            "phase": work.phase.name,
            "step": step,
            "global_step": self.recorder.global_step,
            "depth": len(work.phase.path),
            "held_out_loss": loss["loss"],
            "bits_per_byte": loss["bits_per_byte"],
            "accuracy": loss["accuracy"],
        }
        self._log(row)
        self.reporter.evaluation(row)

    def _finish_phase(self, work: PhaseWork, learned: dict[str, Tree]) -> None:
        phase, weights, rack = work.phase, self.weights, self.setup.rack
        frozen = self.config.memory.finished == "frozen"
        changed = self.recorder.settle(self.phases, work.index, learned, frozen=frozen)
        stacks = [(rack.stacks[i], weights.full(i)) for i in phase.path]
        loss = self._held_out(work, stacks, weights.on_device(EMBED), weights.on_device(HEAD))
        self._report_held_out(work, phase.steps, loss)
        self.recorder.save_learned(changed, self._meta(work, phase.steps))
        tokens = phase.steps * self.loader.batch_size * self.config.data.seq_len
        prefix = {"cached_batches": work.cached_batches, "advanced_stacks": work.advanced_stacks}
        result = {
            "index": work.index,
            "name": phase.name,
            "held_out_loss": loss["loss"],
            "bits_per_byte": loss["bits_per_byte"],
            "accuracy": loss["accuracy"],
            "trainable_params": work.trainable,
            "frozen_params": work.not_trained,
            "tokens": tokens,
            "flops": phase_flops_of(
                rack, phase, self.config.data, streamed=streams(self.config.memory, phase), **prefix
            ),
            "seconds": work.seconds,
            "skipped_steps": work.skipped,
            "peak_device_bytes": peak_device_bytes() or work.step_bytes,
            "peak_host_bytes": peak_host_bytes(),
            "cache_bytes": self.cache.bytes,
            "depth": len(phase.path),
            "path": list(phase.path),
            "versions": {item: weights.versions[item] for item in path_items(phase)},
            "formats": {item: weights.formats[item] for item in path_items(phase)},
        }
        self.recorder.results.append(result)
        self.recorder.forget_depths(self.config.run.keep_depths, trained_apart(self.phases))
        last = work.index == len(self.phases) - 1
        self.recorder.commit(phase=work.index + 1, step=0, finished=last)
        self.reporter.phase_end(result)
