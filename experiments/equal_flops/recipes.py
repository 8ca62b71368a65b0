"""The recipes that are compared, as plain data: what each changes in the configuration that all of them share.

Depths are counted in sixths of the deep model, so that a recipe keeps its meaning at other depths: "2of6" are stacks of
two of six blocks, or of four of twelve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SIXTHS = 6
# The recipe whose best learning rate is used for all recipes of its kind: those in which everything there is learns at
# every step, and those in which something rests.
TUNED = {"end to end": "rackwise", "staged": "append-2of6"}
# The deep model trained end to end, by measure.
DEEP = {"next token": "rackwise", "mask diffusion": "diffusion-rackwise"}


@dataclass(frozen=True)
class Recipe:
    """One line of the table.

    sixths: blocks per stack, and `stacks` of them. changes: overrides, in which {lr} stands for the learning rate.
    plain: an ordinary model trained end to end, so a control. measure: what its bits per byte are comparable with.
    """

    about: str
    changes: tuple[str, ...]
    stacks: int = 3
    sixths: int = 2
    lr: Literal["end to end", "staged"] = "staged"
    plain: bool = False
    measure: Literal["next token", "mask diffusion"] = "next token"

    def overrides(self, depth: int, lr: float) -> list[str]:
        """Command-line overrides for a deep model of `depth` blocks."""
        architecture = {"n_stacks": self.stacks, "blocks_per_stack": self.sixths * depth // SIXTHS}
        given = [f"--model.architecture.{key}={value}" for key, value in architecture.items()]
        task = DIFFUSION if self.measure == "mask diffusion" else ()
        return [
            *given,
            f"--optimizer.lr={lr:g}",
            *task,
            *(change.replace("{lr}", f"{lr:g}") for change in self.changes),
        ]


DIFFUSION = ("--model.attention_preset=bert_style", "--objective.kind=diffusion", "--objective.noise=elbo")
RACKWISE = ("--curriculum.plan=rackwise",)
APPEND = ("--curriculum.plan=append",)
PREPEND = ("--curriculum.plan=prepend",)
CYCLE = ("--curriculum.plan=cycle", "--curriculum.rounds=5")
KEEP_LAST = ("--curriculum.plan=keep_last",)
DECAY_LAST = ("--curriculum.decay=last",)
# Most of the steps with two sixths of the blocks, then the others are added; one decay, as nothing is ever finished.
GROW_LATE = (
    "--curriculum.plan=grow",
    "--curriculum.decay=last",
    "--curriculum.stacks_per_stage=[1, 2]",
    "--curriculum.stages=[{steps: 70}, {steps: 30}]",
)


def _control(sixths: int, **more) -> Recipe:
    return Recipe(
        f"plain model of {sixths}/6 of the blocks",
        RACKWISE,
        stacks=1,
        sixths=sixths,
        lr="end to end",
        plain=True,
        **more,
    )


def _grow(init: str, about: str) -> Recipe:
    return Recipe(
        f"2/6 of the blocks for 70 % of the steps, then all; new ones {about}",
        (*GROW_LATE, f"--curriculum.init={init}"),
        lr="end to end",
    )


RECIPES: dict[str, Recipe] = {
    "rackwise": Recipe("all blocks, end to end", RACKWISE, lr="end to end", plain=True),
    "control-1of6": _control(1),
    "control-2of6": _control(2),
    "control-3of6": _control(3),
    "control-4of6": _control(4),
    "stackwise-2of6": Recipe(
        "stacks that are there from the start, one after another", ("--curriculum.plan=stackwise",)
    ),
    "append-1of6": Recipe("a new stack on a frozen trunk", APPEND, stacks=6, sixths=1),
    "append-2of6": Recipe("a new stack on a frozen trunk", APPEND),
    "append-3of6": Recipe("a new stack on a frozen trunk", APPEND, stacks=2, sixths=3),
    "append-2of6-decay-last": Recipe("the learning rate decays in the last stage only", (*APPEND, *DECAY_LAST)),
    "append-2of6-overlap": Recipe("the stack below the new one learns on", (*APPEND, "--curriculum.overlap=1")),
    "append-2of6-overlap-decay-last": Recipe(
        "the same, the learning rate decays in the last stage only", (*APPEND, "--curriculum.overlap=1", *DECAY_LAST)
    ),
    "append-joint-20": Recipe(
        "append for 80 % of the FLOPs, then everything learns",
        ("--curriculum.plans=[{plan: append, share: 80}, {plan: joint, share: 20}]",),
    ),
    "append-joint-40": Recipe(
        "append for 60 % of the FLOPs without decay, then everything learns",
        (
            "--optimizer.decay=0",
            "--curriculum.plans=[{plan: append, share: 60}, "
            "{plan: joint, share: 40, stages: [{optimizer: {lr: {lr}}}]}]",
        ),
    ),
    "grow-random": _grow("random", "random"),
    "grow-zero": _grow("zero", "random, with zero outputs"),
    "grow-copy": _grow("copy", "copied"),
    "cycle-2of6": Recipe("all blocks there, one stack learns at a time, five turns each", CYCLE),
    "cycle-2of6-decay-last": Recipe("the same, the learning rate decays in the last turn only", (*CYCLE, *DECAY_LAST)),
    "keep-last-2of6": Recipe("append below a last stack that learns on", KEEP_LAST),
    "keep-last-2of6-decay-last": Recipe(
        "the same, the learning rate decays in the last stage only", (*KEEP_LAST, *DECAY_LAST)
    ),
    "prepend-2of6": Recipe("a new stack before a frozen suffix", PREPEND),
    "prepend-2of6-consistency": Recipe(
        "the same, its output kept near the suffix's old input", (*PREPEND, "--curriculum.consistency=0.1")
    ),
    "diffusion-rackwise": Recipe(
        "all blocks, end to end", RACKWISE, lr="end to end", plain=True, measure="mask diffusion"
    ),
    "diffusion-control-2of6": _control(2, measure="mask diffusion"),
    "diffusion-append-2of6": Recipe("a new stack on a frozen trunk", APPEND, measure="mask diffusion"),
    "diffusion-independent-2of6": Recipe(
        "three denoisers, each for a third of the noise, with the embedding and head of its phase; their bounds add up",
        ("--curriculum.plan=independent",),
        measure="mask diffusion",
    ),
}
