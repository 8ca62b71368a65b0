"""The run of seconds that kills, readers and strangers are tried on: configuration keys that it shares."""

SMALL = {
    "data.source": "synthetic",
    "data.synthetic_tokens": 2048,
    "data.seq_len": 16,
    "data.batch_size": 8,
    "model.d_model": 32,
    "model.n_heads": 2,
    "model.d_ff": 48,
    "model.architecture.n_stacks": 2,
    "model.architecture.blocks_per_stack": 1,
    "run.eval_batches": 2,
    "run.sample_tokens": 0,
}
