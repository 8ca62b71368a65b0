"""The bad inputs, as tables: values for keys, YAML texts, files, run directories, and options that do not go together.

In arguments @good is the good run; @files, @runs and @canary are folders that `bad_files.build` makes; @out is free.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bad_files import BOMB, DEEP, FILES, RUNS, small


@dataclass(frozen=True)
class Case:
    """A command line. yaml: text of a file that is given as --config; allowed: it may also succeed."""

    name: str
    command: str
    argv: tuple[str, ...]
    yaml: str | bytes | None = None
    allowed: bool = False


# Values for keys of the configuration.

NO_COUNT = ("-1", "1.5", "abc", "[1]", "{a: 1}", "nan", "1e30", "9" * 25)
NO_NUMBER = ("nan", "inf", "-1", "abc", "[0.1]", "true")
NO_NAME = ("", "Nope", "1", "[]", "{a: b}", "\x1b[31mred")
NO_FLAG = ("maybe", "2", "[]")
KEYS = {
    "model.d_model": NO_COUNT,
    "model.n_heads": NO_COUNT,
    "model.d_ff": NO_COUNT,
    "model.architecture.n_stacks": NO_COUNT,
    "model.architecture.blocks_per_stack": NO_COUNT,
    "curriculum.steps": NO_COUNT,
    "data.seq_len": NO_COUNT,
    "data.batch_size": NO_COUNT,
    "data.synthetic_tokens": NO_COUNT,
    "run.keep": NO_COUNT[:-1],
    "run.save_every": NO_COUNT[:-2],
    "run.seed": ("1.5", "abc", "[1]", "nan"),
    "optimizer.lr": NO_NUMBER,
    "optimizer.weight_decay": NO_NUMBER,
    "optimizer.grad_clip": NO_NUMBER,
    "model.dropout": NO_NUMBER,
    "data.valid_fraction": (*NO_NUMBER, "0", "1"),
    "objective.kind": NO_NAME,
    "curriculum.plan": NO_NAME,
    "optimizer.name": NO_NAME,
    "data.source": NO_NAME,
    "tokenizer.kind": NO_NAME,
    "model.attention_preset": NO_NAME,
    "run.tensorboard": NO_FLAG,
    "curriculum.plans": ("abc", "[1]", "[{plan: nope}]", "[{plam: joint}]", "{plan: joint}", "[[[]]]"),
}
WRONG_KEYS = (
    "--model.d_modell", "--modell.d_model", "--learning_rate", "--model", "--model.architecture", "--n_blocks",
    "--training.epochs", "--run.dirr", "--d_model", "--model.d_model.x", "--.", "--model.", "--\x1b[31m.x",
)  # fmt: skip
ODD_ARGUMENTS = (
    ("model.d_model=16",), ("--model.d_model",), ("--config",), ("--config", ""), ("--config", "/dev/zero"),
    ("--config", "@files/pipe.yaml"), ("--config", "@files/large.yaml"), ("--config", "@files/folder.yaml"),
    ("--config", "@files/loop.yaml"), ("--config", "x" * 5000), ("--config", "@files/good.txt"),
    ("--config", "@files/random.txt"), ("--config", "@files/utf16.txt"), ("--config", "@canary"), ("stray",),
    ("--multirun",), ("--config-name", "x"), ("--json=1",), ("-x",), ("--mesh.process_id", "5"),
    ("--mesh.data", "64"), ("--mesh.num_processes", "-1"), ("--data.path", "@files/good.txt"),
    ("--config", "@good"), ("--config", "@good/rack.json"), ("--config", "@good/metrics.jsonl"),
    ("--config", "https://example.com/a.yaml"), ("--config", "\u043a.yaml"), ("--config", "a.yaml,b.yaml"),
    ("--config", "@good/config.yaml", "more.yaml"), ("--config-name=experiment",), ("--cfg", "job"),
    ("--multirun", "model.d_model=16,32"), ("-m", "model.d_model=16,32"), ("+model.d_model=3",), ("~model.d_model",),
    ("model=small",), ("=",), ("training.training_architecture=blockwise",), ("curriculum.plans[0].plan=joint",),
    ("--curriculum.plans[0].plan=joint",), ("\u2014model.d_model", "16"), ("-model.d_model", "16"), ("",), ("\udcff",),
    ("--MODEL.D_MODEL", "16"), ("--model.d_model\u00a016",), ("--" + "x" * 5000,), ("--json", "true"),
    ("--training.training_architecture", "blockwise"), ("--training.progressive.trunk_strategy", "qlora"),
    ("--training.qlora_enabled", "true"), ("--progressive.max_stacks", "4"), ("--wandb.project", "x"),
    ("--data.source", "huggingface", "--data.path", "wikitext"), ("--data.source=text", "--data.path=@files/*.txt"),
    ("--data.source=text", "--data.path=https://example.com/a.txt"), ("--data.valid_path", "@files/pipe.txt"),
    ("--cache.dir", "@files/good.txt"), ("--cache.dir", "@files/pipe.txt"), ("--cache.dir", "/proc/x"),
    ("--run.dir=null", "--run.name=../x"), ("--run.dir=null", "--run.name=" + "n" * 300),
    ("--run.init_from", "runs/nope"), ("--run.init_from", "@good/rack.json"), ("--run.init_from", "gs://x/y"),
    ("--run.init_from", "@good", "--run.init_depth", "9"), ("--run.init_from", "@good", "--run.init_stacks", "[9]"),
    ("--run.init_stacks", "[0]"), ("--curriculum.adapters.load_from", "@good", "--curriculum.trunk", "adapt"),
    ("--mesh.num_processes", "2", "--mesh.coordinator", "nowhere"),
    ("--mesh.num_processes", "2", "--mesh.coordinator", "localhost:99999999"),
    ("--run.sample_tokens", "4", "--run.sample_prompt", "\udcff"),
)  # fmt: skip
# A plan looks at one process, and needs no text and no other run.
ONLY_TRAIN = ("--mesh", "--cache.dir", "--data.", "--run.init_from", "--curriculum.adapters.load_from")

YAML = {
    "a list": "- 1\n- 2\n",
    "a number": "3\n",
    "a text": "hello\n",
    "nothing": "",
    "comments": "# nothing\n",
    "null": "null\n",
    "tabs": "model:\n\td_model: 16\n",
    "a colon too many": "model: d_model: 16\n",
    "open bracket": "model: [1, 2\n",
    "open quote": 'run:\n  name: "abc\n',
    "two documents": "model: {}\n---\nmodel: {}\n",
    "a key twice": "model:\n  d_model: 16\n  d_model: 32\n",
    "list as key": "? [1, 2]\n: 3\n",
    "mapping as key": "? {a: 1}\n: 3\n",
    "null as key": "null: 1\n",
    "number as key": "1: 2\n",
    "truth as key": "true: 1\n",
    "date as value": "model:\n  d_model: 2026-01-01\n",
    "octal": "model:\n  d_model: 010\n  n_heads: 7\n",
    "clock": "model:\n  d_model: 1:30\n",
    "quoted null": 'model:\n  d_model: "null"\n',
    "yes": "model:\n  d_model: yes\n",
    "binary tag": "model:\n  d_model: !!binary aGVsbG8=\n",
    "python tag": "model: !!python/object/apply:os.system ['touch @canary/touched']\n",
    "set": "model: !!set {a, b}\n",
    "merge": "model:\n  <<: {d_model: 16}\n  <<: [1]\n",
    "recursive alias": "model: &m\n  architecture: *m\n",
    "recursive list": "curriculum:\n  plans: &p [*p]\n",
    "alias of nothing": "model: *nothing\n",
    "aliases": BOMB,
    "deep list": "model: " + "[" * DEEP,
    "deep mapping": "model: " + "{a: " * 5000,
    "deep blocks": "".join(" " * i + "a:\n" for i in range(2000)),
    "digits": "model:\n  d_model: " + "9" * 5000 + "\n",
    "exponent": "optimizer:\n  lr: 1e9999\n",
    "zero byte": b"model:\n  d_model: 1\x006\n",
    "control characters": b"run:\n  name: a\x1b[31mb\n",
    "latin1": "run:\n  name: caf\xe9\n".encode("latin1"),
    "utf16": "model:\n  d_model: 16\n".encode("utf-16"),
    "surrogate": 'run:\n  name: "\\ud800"\n',
    "unknown section": "trainer:\n  steps: 1\n",
    "section as number": "model: 16\n",
    "section as list": "model: [d_model]\n",
    "key with dots": "model.d_model: 16\n",
    "other system": "training:\n  learning_rate: 1e-3\n  progressive:\n    trunk_strategy: frozen\n",
    "custom phases": "curriculum:\n  plan: custom\n  phases: [{name: a, path: [9], train: [9], steps: 1}]\n",
    "custom phases negative": "curriculum:\n  plan: custom\n  phases: [{name: a, path: [-1], train: [0], steps: 1}]\n",
    "custom phases text": "curriculum:\n  plan: custom\n  phases: hello\n",
    "custom phases none": "curriculum:\n  plan: custom\n  phases: []\n",
    "json": '{"model": {"d_model": "sixteen"}}\n',
    "a page": "<!DOCTYPE html>\n<html><body>404: Not Found</body></html>\n",
    "toml": "[model]\nd_model = 16\n",
    "python": "import torch\nconfig = dict(d_model=16)\n",
    "equals": "model.d_model=16\n",
    "another version": "%YAML 3.0\n---\nmodel: {}\n",
    "both sides of a merge": "model:\n<<<<<<< HEAD\n  d_model: 16\n=======\n  d_model: 32\n>>>>>>> x\n",
    "a template": "model:\n  d_model: {{ d_model }}\n",
    "an interpolation": "model:\n  d_model: ${model.n_heads}\n",
    "hydra": "defaults:\n  - model: small\n  - _self_\nhydra:\n  run: {dir: x}\n",
    "emoji": "model:\n  d_model\U0001f642: 16\n",
    "wide digits": "model:\n  d_model: \uff11\uff16\n",
    "arabic digits": "model:\n  d_model: \u0663\u0662\n",
    "digits with underscores": "model:\n  d_model: 1_024\n",
    "escape": 'run:\n  name: "\\q"\n',
    "no key": ": 3\n",
    "empty key": "? \n: 3\n",
    "long key": "a" * 5000 + ": 3\n",
    "many keys": "".join(f"k{i}: 1\n" for i in range(10_000)),
    "many entries": "run:\n  init_stacks: [" + "0," * 20_000 + "]\n",
    "stages text": "curriculum:\n  stages: abc\n",
    "stages negative": "curriculum:\n  stages: [{steps: -1}]\n",
    "custom phases mapping": "curriculum:\n  plan: custom\n  phases: {a: 1}\n",
    "custom phases null": "curriculum:\n  plan: custom\n  phases: [null]\n",
    "custom phases twice": "curriculum:\n  plan: custom\n  phases: [{name: a, path: [0, 0], train: [0], steps: 1}]\n",
    "custom phases digits": (
        "curriculum:\n  plan: custom\n  phases: [{name: a, path: [" + "9" * 20 + "], train: [0], steps: 1}]\n"
    ),
    "custom phases no list": "curriculum:\n  plan: custom\n  phases: [{name: a, path: 0, train: [0], steps: 1}]\n",
    "adapters table": "curriculum:\n  adapters: {table: x, rank: 2}\n",
    "StackWise in PyTorch": (
        "model:\n  d_model: 256\ntraining:\n  training_architecture: progressive\n  training_mode: left2right\n"
        "  fine_tune_mode: clm\n  max_steps: 10\n  progressive:\n    enabled: true\n    trunk_strategy: frozen\n"
        "    cache_activations: true\n    new_stack_precision: full\ndata:\n  use_dummy_data: true\n"
    ),
}  # fmt: skip


def configurations() -> Iterator[Case]:
    """Wrong keys and values, on the command line and in YAML, for train and plan in turns."""
    commands = ("train", "plan")
    pairs = [(key, value) for key, values in KEYS.items() for value in values]
    for i, (key, value) in enumerate(pairs):
        yield Case(f"{key}={value[:30]}", commands[i % 2], (*small(), "--run.dir=@out", f"--{key}={value}"))
    for i, key in enumerate(WRONG_KEYS):
        yield Case(key, commands[i % 2], (*small(), "--run.dir=@out", key, "1"))
    for i, odd in enumerate(ODD_ARGUMENTS):
        command = "train" if odd[0].startswith(ONLY_TRAIN) else commands[i % 2]
        yield Case(" ".join(odd)[:70], command, (*small(), "--run.dir=@out", *odd), allowed="process_id" in odd[0])
    for i, (name, text) in enumerate(YAML.items()):
        command = "train" if name == "surrogate" else commands[i % 2]  # a plan has no use for a name
        yield Case(f"YAML: {name}", command, ("--run.dir=@out",), yaml=text)


# Text, tokenizers and places of runs.

DATA = (
    "",
    ".",
    "/dev/zero",
    "/dev/null",
    "x" * 300,
    "x/" * 3000,
    "a\0b",
    "@files/absent.txt",
    "\udcff.txt",
    "~nobody/x",
)
PLACES = (
    "@canary", "@canary/precious.txt", "@canary/precious.txt/run", "/dev/null", "/proc/run", "x" * 300, "a\0b",
    "@files/loop.txt", "@files/loop.txt/run", "@files/pipe.txt", "gs://x/y", "s3:", "https://x.y/z",
    "@good/rack.json/x", "@good/checkpoints", "@good/tokenizer", "a\nb",
)  # fmt: skip


def files() -> Iterator[Case]:
    """Text, tokenizer and run directory that are not what they should be."""
    texts = [
        *DATA,
        *(f"@files/{name}" for name in FILES if not name.endswith((".model", ".yaml")) and name != "good.txt"),
    ]
    for path in texts:
        source = "jsonl" if path.endswith(".jsonl") else "text"
        argv = (*small(data__source=source), f"--data.path={path}", "--run.dir=@out")
        yield Case(f"data.path {path[:30]}", "train", argv)
        if path not in ("@files/one-line.txt", "@files/twice.txt"):  # a line is enough to evaluate on, if it is long
            yield Case(f"--data.path {path[:30]}", "evaluate", ("@good", "--data.path", path))
    models = ["", "/dev/zero", "x" * 300, "a\0b", *(f"@files/{name}" for name in FILES if name.endswith(".model"))]
    for path in models:
        argv = (*small(tokenizer__kind="file"), f"--tokenizer.path={path}", "--run.dir=@out")
        yield Case(f"tokenizer.path {path[:30]}", "train", argv)
    for path in PLACES:
        yield Case(f"run.dir {path[:30]}", "train", (*small(), f"--run.dir={path}"))
    other = (*small(), "--run.dir=@good", "--model.d_model=32")
    yield Case("another configuration in a run", "train", other)


# Runs for the commands that read one.

NO_RUNS = (
    "", ".", "/", "@absent", "@files/folder", "@files/good.txt", "@files/pipe.txt", "@files/loop.txt", "/dev/zero",
    "x" * 300, "a\0b", "@canary", "@good/checkpoints/absent", "\udcff", "\x1b[31mred", "@good/config.yaml",
    "gs://bucket/run", "run=@good", "-", "\U0001f600", "@good/checkpoints/progress",
)  # fmt: skip
READERS = {
    "evaluate": (),
    "generate": ("--max_tokens", "4"),
    "inspect": ("--norms",),
    "convert": ("@out", "--sizes", "2"),
}
# What some commands do not read, or what a run can do without.
HARMLESS = {
    "no-config": ("inspect",),
    "phases-empty": ("evaluate", "generate", "convert"),
    "phases-object": ("evaluate", "generate", "convert"),
    "phases-numbers": ("evaluate", "generate", "convert"),
    "phases-deep": ("evaluate", "generate", "convert"),
    "phases-digits": ("evaluate", "generate", "convert"),
    "config-huge": ("inspect",),
    "meta-format": tuple(READERS),
    **{f"rack-{what}": ("inspect",) for what in ("empty", "list", "deep", "vocab", "blocks", "pipe")},
    **{f"tokenizer-{what}": ("inspect",) for what in ("list", "deep", "pipe", "kind", "no-model")},
    **{name: tuple(READERS) for name in ("no-tokenizer", "tokenizer-file")},  # bytes need no file
    "meta-history": ("evaluate", "generate", "convert"),
    "progress-results": ("inspect",),
    "no-progress": ("inspect",),
    **{name: ("inspect",) for name in ("no-checkpoints", "checkpoints-file", "stacks-link")},
    **{name: tuple(READERS) for name in ("progress-no-versions", "progress-phase")},  # of a run that has ended
}


def runs() -> Iterator[Case]:
    """Arguments that are no run, and runs that somebody damaged or made to do harm."""
    for command, more in READERS.items():
        for path in NO_RUNS:
            yield Case(f"RUN {path[:30]}", command, (path, *more))
        for name in RUNS:
            yield Case(f"run {name}", command, (f"@runs/{name}", *more), allowed=command in HARMLESS.get(name, ()))
    for name in RUNS:  # the run has ended, so that there may be nothing left to read
        yield Case(f"going on with {name}", "train", (*small(), f"--run.dir=@runs/{name}"), allowed=True)
    for path in NO_RUNS[3:]:
        yield Case(f"--adapters {path[:30]}", "convert", ("@good", "@out", "--adapters", path))


# Options.

OPTIONS = {
    "generate": (
        "--max_tokens -1", "--max_tokens 1e3", "--max_tokens 999999999999", "--temperature -1", "--temperature nan",
        "--temperature inf", "--temperature x", "--top_k -1", "--top_k 1.5", "--top_p 0", "--top_p 2", "--top_p nan",
        "--seed x", "--steps 4", "--steps 0", "--order random", "--order nope", "--block_size 4", "--depth 0",
        "--depth -1", "--depth 9", "--depth 99999999999999999999", "--prompt", "--prompt \udcff",
        "--prompts x", "stray", "--max_tokens 1000000000000", "--max-tokens 5", "--max_new_tokens 5",
        "--temperature 0,7", "--temperature 1e400", "--top_k 99999999999999999999", "--top_p 1e-400", "--seed -1",
        "--seed 4294967296", "--depth \uff11", "--depth=", "--config @good/config.yaml", "--model.d_model 32",
    ),
    "evaluate": (
        "--batches -1", "--batches x", "--draws 0", "--draws -1", "--draws 1000000000000000000000", "--depth 0",
        "--depth 9", "--depth x", "--objective nope", "--attention_mode nope", "--attention_mode",
        "--data.paht x", "stray", "--data.path /proc", "--data.path=", "--data.source text", "--batches 1e21",
        "--config @good/config.yaml", "--model.d_model 32", "@good",
    ),
    "inspect": ("--stack -1", "--stack 9", "--stack x", "--stack 99999999999999999999", "--norm x", "stray"),
    "convert": (
        "@out", "@canary --sizes 2", "@good --sizes 2", "@canary/precious.txt --sizes 2",
        "@canary/precious.txt/run --sizes 2", "/proc/run --sizes 2", " --sizes 2", "@out --sizes 0", "@out --sizes -2",
        "@out --sizes 3", "@out --sizes 1,2", "@out --sizes x", "@out --sizes ,", "@out --sizes 99999999999999999999",
        "@out --depth 0", "@out --depth 9", "@out --remove 0,1", "@out --remove 9", "@out --remove -1",
        "@out --remove 0,0", "@out --insert 9", "@out --insert -1", "@out --init copy", "@out --seed 1",
        "@out --insert 0 --seed x", "@out --merge_adapters", "@out --format nope", "@out --adapters @good",
        "@out stray", "@out --remove 1,1 --format nf4", "@out --sizes 1,1,", "@out --sizes [1,1]", "@out --sizes 10000",
        "@out --insert 0,0,99", "@out --format NF4", "@out --merge-adapters", "@out --adapters @good/checkpoints",
        "@out --merge_base trained", "gs://x/y --sizes 2", "@out/gs: --sizes 2", "@out/a/b/../../../canary --sizes 2",
        f"@out/a/{'x' * 300} --sizes 2", "@files/loop.txt --sizes 2", "/dev/null --sizes 2", "--out @out --sizes 2",
    ),
}  # fmt: skip
PLAN = (
    "--device nope", "--device -1", "--device 1e99GB", "--host x", "--host -5GB", "--disk nan", "--host 0", "--device",
    "--data.seq_len 1000000000", "--curriculum.steps 100000000000000", "--model.architecture.n_stacks 100000000",
    "--optimizer.name muon --optimizer.lr x", "--advice",
)  # fmt: skip

POINTLESS = ("--host 0", "--curriculum.steps 100000000000000", "@out --merge_adapters")  # and yet no mistake


def options() -> Iterator[Case]:
    """Options out of their range, unknown, without a value, or that do not go together."""
    for command, lines in OPTIONS.items():
        for line in lines:
            yield Case(line, command, ("@good", *line.split(" ")), allowed=line in POINTLESS)
        yield Case("no arguments", command, ())
    for line in PLAN:
        yield Case(line, "plan", (*small(), "--run.dir=@out", *line.split(" ")), allowed=line in POINTLESS)


def hostile() -> Iterator[Case]:
    """Names that are allowed and must not reach the terminal as they are."""
    for name in ("\x1b[31mred", "[red]a[/]", "[/b]", "a\u202eb"):
        yield Case(
            f"run.name {name}", "train", (*small(), "--run.dir=@out", f"--run.name={name}", "--dry-run"), allowed=True
        )
        yield Case(f"prompt {name}", "generate", ("@good", "--prompt", name, "--max_tokens", "4"), allowed=True)


def all_cases() -> list[Case]:
    """Every bad input."""
    return [case for group in (configurations, files, options, hostile, runs) for case in group()]
