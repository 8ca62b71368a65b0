"""Recipes at equal compute: trains every recipe of recipes.py with the same number of FLOPs and compares them.

    python experiments/equal_flops/run.py --train FILE --valid FILE [--out DIR] [--budget FLOPS] [--only NAME ..]

First the learning rate is tuned, for end-to-end training on `rackwise` and for staged training on `append-2of6`; then
every recipe runs with seed 0; then, for next-token prediction, these run with more seeds: the deep model trained end to
end, the two best recipes that need less learning state than it, and the plain models that these two are held against.
Each run is an ordinary run of the package under OUT/runs. What is finished is not done again, so the same command
continues after Ctrl-C, with more recipes or more seeds; with --report_only it runs nothing and reports on what is
finished. OUT/RESULTS.md holds the tables, OUT/quality.svg the picture, OUT/results.json every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compare import lines_of, to_repeat
from floors import ngram_floors
from jobs import Job, Runner, Settings
from recipes import DEEP, RECIPES, SIXTHS, TUNED
from report import MEASURES, Report, write_report
from tuning import edge_warnings

from stackwise_jax.config import load_config
from stackwise_jax.errors import UsageError
from stackwise_jax.reporting import add_common, run_command

BEST = 2  # recipes that are repeated with more seeds
FIXED = (
    "--data.source=text",
    "--data.packing=chunk",  # a plain stream, as an n-gram model sees it
    "--cache.kind=recompute",  # fresh tokens, and FLOPs exactly as the budget says
    "--run.tensorboard=false",
    "--run.sample_tokens=0",
    "--run.eval_batches=8",  # the figures are measured on more when a run has ended
)


def build_parser() -> argparse.ArgumentParser:
    """The arguments of the script."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--train", required=True, metavar="FILE", help="text to train on")
    parser.add_argument("--valid", required=True, metavar="FILE", help="held-out text")
    parser.add_argument("--out", type=Path, default=Path("runs/equal_flops"), metavar="DIR", help="for all results")
    parser.add_argument("--budget", type=float, default=5e12, metavar="FLOPS", help="of each run")
    parser.add_argument("--only", nargs="+", choices=RECIPES, metavar="NAME", help=f"some of: {', '.join(RECIPES)}")
    parser.add_argument("--seeds", type=int, default=3, help="of the best recipes and their controls")
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="one alone: no tuning")
    parser.add_argument("--depth", type=int, default=6, help="blocks of the deep model, a multiple of 6")
    for name, size in {"d_model": 128, "n_heads": 4, "d_ff": 352}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--seq_len", type=int, default=128, help="tokens")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences")
    parser.add_argument("--eval_batches", type=int, default=196, help="held-out batches; 0: the whole text")
    parser.add_argument("--draws", type=int, default=4, help="mask diffusion: corruptions of the held-out text")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores")
    parser.add_argument("--report_only", action="store_true", help="run nothing, report on what is finished")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a configuration key")
    add_common(parser)
    return parser


def settings_of(args: argparse.Namespace) -> Settings:
    """What all runs share.

    Raises:
        UsageError: an argument cannot be used.
    """
    if args.depth < SIXTHS or args.depth % SIXTHS:
        raise UsageError(f"--depth is {args.depth}; write a multiple of {SIXTHS}, because recipes count in sixths")
    for name in ("seeds", "jobs", "draws"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} is {getattr(args, name)}; write at least 1")
    sizes = [f"--model.{name}={getattr(args, name)}" for name in ("d_model", "n_heads", "d_ff")]
    sizes += [f"--data.{name}={getattr(args, name)}" for name in ("seq_len", "batch_size")]
    texts = [f"--data.path={Path(args.train).resolve()}", f"--data.valid_path={Path(args.valid).resolve()}"]
    common = (*FIXED, *texts, *sizes, f"--curriculum.budget={args.budget:g} flops", *(f"--{s}" for s in args.set))
    return Settings(args.out.resolve(), common, args.depth, args.eval_batches, args.draws, args.jobs)


def choose_rates(runner: Runner, names: Sequence[str], lrs: Sequence[float]) -> dict[str, float]:
    """The learning rate of each kind of recipe among `names`: the best of `lrs` for its tuned recipe, at seed 0.

    If nothing may run, a kind without finished runs is left out.
    """
    kinds = dict.fromkeys(RECIPES[name].lr for name in names)
    if len(lrs) == 1:
        return dict.fromkeys(kinds, lrs[0])
    trials = {kind: [Job(TUNED[kind], lr, 0) for lr in lrs] for kind in kinds}
    runner.run([job for jobs in trials.values() for job in jobs])
    runner.check()
    finished = {kind: [job for job in jobs if job in runner.results] for kind, jobs in trials.items()}
    return {
        kind: min(jobs, key=lambda job: runner.results[job]["bits_per_byte"]).lr
        for kind, jobs in finished.items()
        if jobs
    }


def planned_runs(names: Sequence[str], n_rates: int, seeds: int) -> int:
    """How many runs there will be at most."""
    kinds = {RECIPES[name].lr for name in names} if n_rates > 1 else set()
    trials = sum(n_rates - (TUNED[kind] in names) for kind in kinds)
    plain = [RECIPES[name].plain for name in names if RECIPES[name].measure == "next token"]
    best, deep = min(BEST, plain.count(False)), DEEP["next token"] in names
    controls = min(2 * best, plain.count(True) - deep)  # of each its control and its best plain model
    return trials + len(names) + (deep + best + controls) * (seeds - 1)


def run_all(runner: Runner, rates: dict[str, float], names: Sequence[str], n_seeds: int) -> None:
    """Every recipe at seed 0, and those that are worth it with the other seeds; what else is finished is taken too."""

    def jobs(of: Sequence[str], seeds: Iterable[int]) -> list[Job]:
        return [Job(name, rates[RECIPES[name].lr], s) for s in seeds for name in of if RECIPES[name].lr in rates]

    first = jobs(names, [0])
    runner.run(first)
    at_zero = {job: runner.results[job] for job in first if job in runner.results}
    runner.run(jobs(to_repeat(lines_of(at_zero, rates, "next token"), BEST), range(1, n_seeds)))
    for job in jobs(names, range(1, n_seeds)):
        runner.read(job)


def machine() -> str:
    """Where the runs ran, in words."""
    return f"{os.cpu_count()} CPU cores, jax {version('jax')}"


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything that is asked for and write the report.

    Raises:
        UsageError: nothing is finished that could be reported on.
        RunError: a run failed; the others are done and reported.
    """
    settings, names = settings_of(args), args.only or list(RECIPES)
    given = [argument for argument in args.command_line if argument != "--report_only"]
    command = shlex.join(["python", "experiments/equal_flops/run.py", *given])
    config = load_config(None, list(settings.common))
    floors = ngram_floors(config, settings.out / "tokenizer", settings.eval_batches)
    print(f"n-gram floors: {', '.join(f'{bits:.3f}' for bits in floors)} bits per byte", flush=True)
    report = Report(floors, command, time.strftime("%Y-%m-%d"), machine())

    def save(results: dict[Job, dict]) -> None:
        rows = [{"recipe": job.recipe, "lr": job.lr, "seed": job.seed} | found for job, found in results.items()]
        content = {"command": command, "floors": floors, "rates": report.rates, "runs": rows}
        part = settings.out / "results.part"
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(part, settings.out / "results.json")
        report.results = dict(results)

    planned = planned_runs(names, len(args.lrs), args.seeds)
    runner = Runner(settings, planned, save, read_only=args.report_only)
    try:
        report.rates |= choose_rates(runner, names, args.lrs)
        print(f"learning rates: {', '.join(f'{kind} {lr:g}' for kind, lr in report.rates.items())}", flush=True)
        for warning in edge_warnings(report.results, report.rates):
            print(f"warning: {warning}", flush=True)
        run_all(runner, report.rates, names, args.seeds)
    finally:
        if runner.results and report.rates:
            print(write_report(report, settings.out), flush=True)
    runner.check()
    if not runner.results:
        raise UsageError(
            f"no finished run under {settings.out / 'results'}; leave out --report_only to run the recipes"
        )
    return {
        "out": str(settings.out),
        "floors": floors,
        "rates": report.rates,
        "rows": {m: report.rows(m) for m in MEASURES},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    parser = build_parser()
    parser.set_defaults(command_line=argv)
    return run_command(compare, parser, argv, interrupted="interrupted; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
