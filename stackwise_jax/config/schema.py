"""Every key of a run and its default.

Frozen dataclasses hold all the defaults, YAML holds only the differences. Each section is passed only to the part that
owns it. Sizes in tokens, steps or bytes are said in the comment of the key.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, get_args

Dtype = Literal["fp32", "bf16", "fp16"]
Format = Literal["fp32", "bf16", "fp16", "int8", "fp8", "nf4", "nvfp4"]  # of weights that do not learn
ObjectiveKind = Literal["clm", "mlm", "diffusion"]
ObjectiveMode = Literal["auto", "causal", "bidirectional", "model"]
NoiseKind = Literal["range", "elbo"]
NoiseSchedule = Literal["linear", "cosine", "exponential"]
Corruption = Literal["auto", "fixed", "fresh"]
OptimizerName = Literal["adamw", "sgd", "lion", "adafactor", "muon", "adamw8bit"]
LrSchedule = Literal["constant", "cosine", "linear", "wsd"]
PlanName = Literal[
    "rackwise",
    "stackwise",
    "layerwise",
    "blockwise",
    "append",
    "prepend",
    "grow",
    "keep_last",
    "cycle",
    "independent",
    "fusion",
    "joint",
    "custom",
]
TimeKind = Literal["none", "depth", "input"]
StackInit = Literal["random", "copy", "zero"]
WhenLearns = Literal["auto", "always", "first", "last", "never"]
AdapterTarget = Literal[
    "q", "k", "v", "o", "gate", "up", "down", "q_a", "q_b", "kv_a", "kv_b", "k_a", "k_b", "v_a", "v_b"
]
AttentionPreset = Literal[
    "bert_style", "gpt_style", "efficient_gqa", "mla_attention", "kernel_attention", "mlgka", "custom"
]
AttentionType = Literal["mha", "gqa", "mla", "low_rank"]
AttentionImplementation = Literal["auto", "reference", "chunked", "cudnn", "pallas"]
KernelType = Literal["gaussian", "laplacian", "cauchy", "uniform", "linear"]
AdapterStrategy = Literal["simplified", "progressive", "variable"]
AdapterPattern = Literal["constant", "increasing", "decreasing", "linear"]


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how it reports."""

    dir: str | None = None  # the run directory; None: runs/<name>
    name: str | None = None  # None: the stem of the last config file
    seed: int = 0  # of all that is random: weights, order of batches, corruption, dropout
    init_from: str | None = None  # a run directory whose trained weights this run starts from
    init_depth: int | None = None  # init_from: as the other run was at this depth; None: as it ended
    init_stacks: list[int] = field(default_factory=list)  # init_from: its stacks that become 0, 1, ..; empty: all
    resume: Literal["auto", "never"] = "auto"  # auto: the same command again continues; never: refuse an existing run
    save_every: int = 200  # steps between checkpoints inside a phase; 0: only when a phase ends
    keep: int = 2  # progress records kept; the stacks that they need are never removed
    keep_depths: int | None = None  # depths that stay loadable as they ended, newest first; None: all, each with a head
    eval_every: int = 0  # steps between held-out evaluations inside a phase; 0: only when a phase ends
    eval_batches: int = 32  # held-out batches per evaluation; 0: all of them
    log_every: int = 10  # steps between lines of metrics.jsonl
    max_bad_steps: int = 10  # this many non-finite steps in a row stop the run
    tensorboard: bool = True  # also write TensorBoard files
    sample_tokens: int = 128  # length of the text sample at the end, in tokens; 0: none
    sample_prompt: str = "The "  # how the text sample begins


@dataclass(frozen=True)
class DataConfig:
    """What text is read and how it is cut."""

    source: Literal["python-docs", "text", "jsonl", "synthetic"] = "python-docs"  # text and jsonl need path
    path: str | None = None  # text: a file or a folder of *.txt; jsonl: a file or a folder of *.jsonl
    valid_path: str | None = None  # held-out text; None: valid_fraction of the documents
    valid_fraction: float = 0.05  # share of the documents held out when there is no valid_path
    text_key: str = "text"  # jsonl: the key that holds the text
    seq_len: int = 256  # tokens
    batch_size: int = 16  # sequences per step, over all devices
    packing: Literal["pack", "chunk"] = "pack"  # pack: whole documents with segment ids; chunk: a plain stream
    shuffle: bool = True  # sequences and batches, by run.seed, in another way each epoch
    synthetic_tokens: int = 1_000_000  # synthetic: length of the training text, in symbols


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens."""

    kind: Literal["bytes", "sentencepiece", "file"] = "bytes"  # sentencepiece: trained on the text
    vocab_size: int = 4096  # sentencepiece: pieces to train (fewer where the text does not hold as many)
    path: str | None = None  # file: a SentencePiece .model


@dataclass(frozen=True)
class ArchitectureConfig:
    """The depth of the rack: n_stacks * blocks_per_stack blocks."""

    n_stacks: int = 4  # each stack is trained, placed and saved on its own
    blocks_per_stack: int = 2  # a block: attention and feed-forward


@dataclass(frozen=True)
class MLAConfig:
    """Sizes of the attention types mla and low_rank. What is null has the proportions of DeepSeek-V2-Lite."""

    rq: int | None = None  # rank of the queries; None: they are not compressed
    rkv: int | None = None  # mla: of the latent of keys and values; low_rank: of each; None: a quarter of d_model
    nope_dim: int | None = None  # mla: of a head, the part without positions; None: d_model / n_heads
    rope_dim: int | None = None  # mla without a kernel: of a head, the rotary part; None: half of nope_dim, made even
    v_dim: int | None = None  # mla: of a value head; None: nope_dim


@dataclass(frozen=True)
class KernelConfig:
    """Random features in the place of the products of queries and keys (Rahimi and Recht 2007)."""

    type: KernelType | None = None  # None: the preset's, which is none but for kernel_attention and mlgka
    mode: Literal["softmax", "linear"] = "softmax"  # linear: time and memory linear in the length of a sequence
    features: int = 128  # of a query or key head
    bandwidth: float | None = None  # where the kernel falls off, 1: typical distances; None: 1, of the laplacian 16
    learn: bool = False  # the random matrix learns, too


@dataclass(frozen=True)
class ModelConfig:
    """The rack: its shape, attention and precision."""

    d_model: int = 128  # width of the residual stream
    n_heads: int = 4  # query heads; divides d_model
    n_kv_heads: int | None = None  # None: what the preset says
    d_ff: int = 384  # width inside the feed-forward part
    vocab_size: int | None = None  # None: the tokenizer's, padded to a multiple of vocab_multiple
    vocab_multiple: int = 128  # the vocabulary is padded to a multiple of it
    attention_preset: AttentionPreset = "gpt_style"  # mode, type, kernel and how many key/value heads
    attention_type: AttentionType | None = None  # how queries, keys and values are made; None: what the preset says
    attention_implementation: AttentionImplementation = "auto"  # what cannot do the case gives way, and is logged
    attention_mode: Literal["bidirectional", "causal"] | None = None  # None: what the preset says
    use_rope: bool = True  # rotary positions
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    dropout: float = 0.0  # share of the activations that is dropped in training; 0: off
    freeze_up_proj: bool = True  # the SwiGLU up-projection is fixed random: seeded, not trained, not in the optimizer
    tie_embeddings: bool = False  # the head's kernel is the embedding
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    residual_gain: float = 1.0  # both branches of a block are multiplied by it before they are added; 1: off
    spectral_norm: float = 0.0  # the largest singular value that a matrix of a block acts with; 0: off
    time_embedding: Literal["sinusoidal", "learned"] = "sinusoidal"  # objective.time input: how the share enters
    init_std: float = 0.02  # of the initial head; of the embedding times sqrt(d_model), or the same where tied
    param_dtype: Literal["fp32", "bf16"] = "fp32"  # of what learns
    compute_dtype: Dtype = "fp32"  # of activations and matrix products; norms and softmax are fp32
    quantized_matmul: Literal["dequantize", "native"] = "dequantize"  # native: int8 and fp8 weights meet inputs in kind
    remat: bool = False  # recompute each block in the backward pass instead of keeping its activations
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    mla: MLAConfig = field(default_factory=MLAConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted from what."""

    kind: ObjectiveKind = "clm"  # clm: the next token; mlm, diffusion: hidden tokens
    mask_fraction: float = 0.15  # mlm: share of the tokens that are chosen
    noise: NoiseKind = "range"  # diffusion: ratio from a range, or t ~ U(0,1) weighted to bound the likelihood
    min_fraction: float = 0.15  # diffusion, range
    max_fraction: float = 0.90  # diffusion, range
    schedule: NoiseSchedule = "linear"  # diffusion: how the masked share grows with t
    time: TimeKind = "none"  # diffusion: depth: each stack has its level of noise; input: the hidden share is an input
    levels: list[float] = field(default_factory=list)  # time depth: share hidden at each stack; empty: by schedule
    interval_overlap: float = 0.0  # plan independent: how far each cut of the noise reaches into the next, in cuts
    corruption: Corruption = "auto"  # auto: fixed where the prefix is cached, fresh elsewhere
    attention_mode: ObjectiveMode = "auto"  # auto: causal for clm, else bidirectional; model: each block's own


@dataclass(frozen=True)
class OptimizerConfig:
    """How what learns is updated. The schedule runs anew in each phase."""

    name: OptimizerName = "adamw"  # muon: on matrices, adamw elsewhere
    lr: float = 1e-3  # the highest of the phase
    schedule: LrSchedule = "wsd"  # wsd: warm-up, stable, decay
    warmup: float = 0.05  # share of the phase
    decay: float = 0.3  # wsd: share of the phase, at its end
    final_lr: float = 0.0  # where the schedule ends, as a share of lr
    weight_decay: float = 0.1  # on matrices only: not on embeddings, norms or the head's norm
    b1: float = 0.9  # sgd and muon: the momentum
    b2: float = 0.95  # adamw: of the squared gradients; lion: of the momentum
    eps: float = 1e-8  # adamw: added to the root of the squares
    grad_clip: float = 1.0  # norm of the gradient; 0: off
    clip: Literal["global", "stack"] = "global"  # the norm of all that learns, or of each stack
    state_dtype: Literal["fp32", "bf16"] | None = None  # of the momentum, not adafactor's; None: that of the weights
    rounding: Literal["nearest", "stochastic"] = "nearest"  # of bf16 weights when they are updated
    microbatches: int = 1  # the batch is cut in so many parts inside the step; gradients are those of the full batch


@dataclass(frozen=True)
class AdapterRow:
    """One stack in the table of adapters.strategy variable."""

    rank: int = 8  # of its stack adapter; 0: none
    alpha: float = 16.0  # alpha / rank is the scale


@dataclass(frozen=True)
class AdaptersConfig:
    """LoRA adapters (Hu et al. 2021): y = x W + alpha / rank * x A B."""

    rank: int = 8  # of the adapter that a stack gets when it is frozen; 0: none
    alpha: float = 16.0  # alpha / rank is the scale
    trunk_rank: int = 4  # of the adapter that all earlier stacks get when a new one arrives; 0: none
    trunk_alpha: float = 8.0  # the same for trunk_rank
    dropout: float = 0.0  # share of the adapter's input that is dropped in training
    targets: list[AdapterTarget] = field(default_factory=lambda: [*get_args(AdapterTarget)])  # of a block's matrices
    strategy: AdapterStrategy = "simplified"  # one rank; ranks by depth (rank_pattern, alpha_pattern); or the table
    rank_pattern: AdapterPattern = "constant"  # progressive: from rank at the input: doubling, halving, by rank more
    alpha_pattern: AdapterPattern = "constant"  # progressive: the same for alpha
    table: list[AdapterRow] = field(default_factory=list)  # variable: per stack, from the input
    lr: float | None = None  # highest of the phase; None: optimizer.lr
    merge: bool = False  # at each phase border merge them into the weights and begin anew (ReLoRA, Lialin et al. 2023)
    load_from: str | None = None  # a run directory whose adapters are put on this rack's stacks


@dataclass(frozen=True)
class StageConfig:
    """What one phase of a plan has of its own. None: as in the sections objective, optimizer and curriculum."""

    name: str | None = None  # None: the plan's
    steps: int | None = None  # None: curriculum.steps
    lr: float | None = None  # None: optimizer.lr
    frozen: Format | None = None  # None: curriculum.frozen
    level: float | None = None  # the share hidden, diffusion; None: the plan's
    objective: ObjectiveConfig | None = None  # keys left out keep their defaults
    optimizer: OptimizerConfig | None = None  # keys left out keep their defaults


@dataclass(frozen=True)
class PhaseConfig(StageConfig):
    """One entry of curriculum.phases (plan custom)."""

    path: list[int] = field(default_factory=list)  # stack ids, input to head; empty: all
    train: list[int] = field(default_factory=list)  # stack ids that learn
    adapt: list[int] = field(default_factory=list)  # stack ids of which only the adapters learn
    train_embed: bool = False  # the embedding learns
    train_head: bool = True  # final norm and head learn
    init: StackInit | None = None  # of stacks that the phase grows; None: curriculum.init
    keep_optimizer: bool = False  # what learned before goes on with its optimizer state
    merge_adapters: bool = False  # at the start of the phase, into the weights


@dataclass(frozen=True)
class PlanConfig:
    """A plan and its arguments."""

    plan: PlanName = "stackwise"  # custom: the list in phases
    steps: int = 200  # per phase
    steps_growth: float = 1.0  # each phase has so many times the steps of the one before
    stages: list[StageConfig] = field(default_factory=list)  # what single phases have of their own, in their order
    block_size: int = 2  # blockwise: blocks per stack after regrouping
    frozen: Format = "fp32"  # how weights that do not learn are stored; embedding and head at least in bf16
    frozen_stacks: list[Format] = field(default_factory=list)  # the same for each stack from the input; empty: frozen
    stacks_per_stage: list[int] = field(default_factory=lambda: [1])  # new or learning stacks; the last entry repeats
    init: StackInit = "random"  # of stacks that join others; copy: of the nearest; zero: random, but identity at birth
    overlap: int = 0  # stackwise and its kin, append, prepend, keep_last: earlier stacks that learn on beside new ones
    train_embed: WhenLearns = "auto"  # in which phases the embedding learns; auto: what suits the plan
    train_head: WhenLearns = "auto"  # the same for final norm and head
    decay: Literal["every", "last"] = "every"  # the learning rate decays in every phase, or only in the last
    optimizer_state: Literal["auto", "keep", "reset"] = "auto"  # at borders; auto: kept where stacks go on learning
    trunk: Literal["frozen", "adapt"] = "frozen"  # stacks that do not learn: fixed, or their adapters learn
    rounds: int = 1  # cycle: how often each stack has its turn
    last_learns: bool = True  # keep_last: the last stack goes on learning after the first phase
    learn: list[int] = field(default_factory=list)  # fusion: stacks that learn; empty: the last
    consistency: float = 0.0  # prepend: weight of the distance between new stacks' output and the suffix's old input
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    phases: list[PhaseConfig] = field(default_factory=list)  # custom


@dataclass(frozen=True)
class PlanEntryConfig(PlanConfig):
    """One entry of curriculum.plans; keys left out keep their defaults."""

    share: float = 1.0  # its part of curriculum.budget, relative to the other entries


@dataclass(frozen=True)
class CurriculumConfig(PlanConfig):
    """Which list of phases is run."""

    budget: str | None = None  # of the whole run, "3000 steps", "5M tokens" or "2e15 flops": scales the steps of phases
    plans: list[PlanEntryConfig] = field(default_factory=list)  # run one after another, in the place of plan

    @property
    def title(self) -> str:
        """The names of the plans that are run."""
        return " + ".join(entry.plan for entry in self.plans) or self.plan


@dataclass(frozen=True)
class CacheConfig:
    """Where the activations of the frozen prefix live."""

    kind: Literal["auto", "host", "disk", "recompute"] = "auto"  # auto: unless revisited too often
    host_budget: str = "4GiB"  # per process; beyond it chunks go to the spill file
    disk_budget: str = "64GiB"  # of the spill file, per process
    dir: str | None = None  # of the spill file; None: the run directory
    read_ahead: int = 2  # chunks


@dataclass(frozen=True)
class MemoryConfig:
    """Where weights and optimizer state live, and what they have to fit into."""

    offload: Literal["none", "trunk", "trunk+optimizer", "all"] = "none"  # what waits off the device, moved when needed
    offload_to: Literal["host", "disk"] = "host"  # where it waits: pinned host memory, or a mapped scratch file
    stack_inputs: Literal["device", "host"] = "device"  # offload: where inputs of stacks wait for the backward pass
    finished: Literal["master", "frozen"] = "master"  # how stacks that no later phase trains are kept in checkpoints
    device: str | None = None  # memory to fit into: h200, a100-80, rtx4090, t4, cpu, a size; None: what is here
    host: str | None = None  # host memory to fit into, a size; None: what is here
    disk: str | None = None  # disk of the run directory to fit into, a size; None: what is free
    check: Literal["refuse", "warn", "off"] = "refuse"  # what train does with a run that will not fit


@dataclass(frozen=True)
class MeshConfig:
    """Devices: a mesh with the axes data and fsdp, and the processes that share it."""

    data: int = -1  # -1: all devices that fsdp leaves
    fsdp: int = 1  # devices that share each weight
    coordinator: str | None = None  # host:port of process 0 when there are several processes
    num_processes: int = 1  # that share the mesh
    process_id: int = 0  # of this process, from 0


@dataclass(frozen=True)
class StackWiseConfig:
    """The full configuration of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def to_dict(self) -> dict:
        """The configuration as plain nested dicts (what config.yaml of a run holds)."""
        return dataclasses.asdict(self)

    @classmethod
    def from_yaml(cls, path: str) -> StackWiseConfig:
        """Read a YAML file that holds the differences from the defaults.

        Raises:
            UsageError: the file is missing, is no YAML, or holds an unknown key or a wrong value.
        """
        from stackwise_jax.config.loading import load_config

        return load_config(path)
