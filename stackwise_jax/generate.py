"""Continue a text with a trained run: `python -m stackwise_jax.generate RUN --prompt TEXT`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from stackwise_jax.config import CommandParser, number, path, whole_number
from stackwise_jax.config.bounds import COUNTER, SAMPLE, SEED
from stackwise_jax.errors import UsageError
from stackwise_jax.reporting.command import add_common, print_notes, run_command
from stackwise_jax.reporting.terminal import printable, say

if TYPE_CHECKING:
    from stackwise_jax.engine import LoadedRun

ORDERS = ("confidence", "random", "entropy", "margin")  # those of sampling, whose import would delay --help


def build_parser() -> CommandParser:
    """The arguments of the command."""
    parser = CommandParser(
        prog="python -m stackwise_jax.generate",
        description="Continue a text with the model of a run: left to right with a key/value cache (objective clm), or "
        "by unmasking a block behind the prompt (mlm, diffusion): in several passes, in one where depth is time, or "
        "by one stack after the other where stacks were trained apart.",
    )
    parser.add_argument("run", metavar="RUN", type=path, help="a run directory")
    parser.add_argument("--prompt", default="", help="text to start from (default: empty)")
    parser.add_argument(
        "--max_tokens",
        type=whole_number(1, SAMPLE),
        default=128,
        help="new tokens, for clm at most (default: %(default)s)",
    )
    parser.add_argument("--temperature", type=number, default=0.8, help="0: the likeliest token (default: %(default)s)")
    parser.add_argument(
        "--top_k",
        type=whole_number(0, COUNTER),
        help="only the k likeliest tokens; 0: all (default: 0)",
    )
    parser.add_argument(
        "--top_p",
        type=number,
        help="only the likeliest tokens that reach this probability together; 1: all (default: 1)",
    )
    parser.add_argument("--seed", type=whole_number(0, SEED), help="the same seed gives the same text (default: 0)")
    parser.add_argument(
        "--steps",
        type=whole_number(1, SAMPLE),
        help="mlm, diffusion: forward passes (default: one per token; one per stack where stacks were trained apart)",
    )
    parser.add_argument(
        "--order",
        choices=ORDERS,
        help="mlm, diffusion: which tokens are unmasked first (default: confidence)",
    )
    parser.add_argument(
        "--block_size",
        type=whole_number(1, SAMPLE),
        help="mlm, diffusion: finish blocks of so many tokens from left to right (default: all tokens at once)",
    )
    parser.add_argument(
        "--depth",
        type=whole_number(-COUNTER, COUNTER),
        help="only the first DEPTH stacks (default: all that were trained)",
    )
    add_common(parser)
    return parser


def generate(args: argparse.Namespace) -> dict[str, Any]:
    """Load the run, make and print the text, and return the answer for --json.

    `seconds` covers the sampling from prompt to text, its compilation included, and `tokens` are the new ones.

    Raises:
        UsageError: the run does not exist, or an argument is out of its range or does not go with the run's model.
    """
    from stackwise_jax.sampling import model_of, sample

    if not _is_text(args.prompt):
        raise UsageError("--prompt holds bytes that are no UTF-8 text; write it in UTF-8")
    print_notes(_without_effect(args))
    runs = load_models(args.run, args.depth)
    start = time.perf_counter()
    result = sample(
        **model_of(runs),
        prompt=args.prompt,
        max_tokens=args.max_tokens,
        seed=args.seed or 0,
        temperature=args.temperature,
        top_k=args.top_k or 0,
        top_p=1.0 if args.top_p is None else args.top_p,
        steps=args.steps,
        order=args.order,
        block_size=args.block_size,
    )
    seconds = time.perf_counter() - start
    _warn_of_length(result.n_prompt + result.n_new, runs[0].config.data.seq_len)
    print(printable(result.text, keep="\n\t"))
    return {
        "prompt": args.prompt,
        "text": result.text,
        "tokens": result.n_new,
        "seconds": seconds,
        "tokens_per_second": result.n_new / seconds,
    }


def load_models(run_dir: str, depth: int | None) -> list[LoadedRun]:
    """The models of a run that sample together: one, or those that were trained apart; at a depth always one."""
    from stackwise_jax.engine import load_experts, load_rack

    return load_experts(run_dir) if depth is None else [load_rack(run_dir, depth=depth)]


def _without_effect(args: argparse.Namespace) -> Iterator[str]:
    """Options that were given and change nothing where the likeliest token is always taken."""
    if args.temperature == 0:
        for name in ("top_k", "top_p", "seed"):
            if getattr(args, name) is not None and not (name == "seed" and args.order == "random"):
                yield f"--{name} has no effect under --temperature 0, which takes the likeliest token"


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:  # Python keeps undecodable bytes of the command line as lone surrogates
        return False
    return True


def _warn_of_length(n_tokens: int, seq_len: int) -> None:
    if n_tokens > seq_len:
        say(
            f"note: prompt and new text are {n_tokens} tokens long, the run saw at most {seq_len} at once "
            "(data.seq_len); beyond that the text may be worse",
            stderr=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(generate, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
