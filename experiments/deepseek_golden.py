"""Writes tests/golden/deepseek_attention.json: inputs, weights and outputs of DeepSeek-V3's attention.

The class is that of Hugging Face transformers, on random weights of few decimals, in float32 and causal. It needs torch
and transformers: pip install torch transformers.

    python experiments/deepseek_golden.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "deepseek_attention.json"
SIZES = {"d_model": 16, "n_heads": 2, "rkv": 12, "nope_dim": 8, "rope_dim": 4, "v_dim": 6, "rope_theta": 10_000.0}
CASES = {  # with and without compressed queries; pairs of rotary entries side by side, or half a head apart
    "interleaved": {"rq": 10, "interleave": True},
    "halves": {"rq": 10, "interleave": False},
    "full queries": {"rq": None, "interleave": True},
}


def attention_case(case: dict[str, Any], seed: int) -> dict[str, Any]:
    """One case as lists of numbers.

    Args:
        case: "rq" (the queries' rank, or None) and "interleave" (how the rotary entries of a head are laid out).
        seed: of the weights and the input.

    Returns:
        The sizes, "state" (the class's own names and shapes, matrices (out, in)), "inputs" (B, T, D), "positions" (T,)
        and "outputs" (B, T, D).
    """
    import torch
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    config = deepseek.DeepseekV3Config(
        hidden_size=SIZES["d_model"],
        num_attention_heads=SIZES["n_heads"],
        num_key_value_heads=SIZES["n_heads"],
        q_lora_rank=case["rq"],
        kv_lora_rank=SIZES["rkv"],
        qk_nope_head_dim=SIZES["nope_dim"],
        qk_rope_head_dim=SIZES["rope_dim"],
        v_head_dim=SIZES["v_dim"],
        rope_interleave=case["interleave"],
        rope_parameters={"rope_type": "default", "rope_theta": SIZES["rope_theta"]},
        attn_implementation="eager",
    )
    rng = np.random.default_rng(seed)
    draw = lambda shape, scale: np.round(rng.normal(size=shape, scale=scale), 3).astype(np.float32)
    module, B, T = deepseek.DeepseekV3Attention(config, layer_idx=0).eval(), 2, 7
    state = {name: draw(x.shape, 0.3) + (x.ndim == 1) for name, x in module.state_dict().items()}
    module.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    inputs_BTD, positions_T = draw((B, T, SIZES["d_model"]), 1.0), np.arange(3, 3 + T)
    x_BTD = torch.tensor(inputs_BTD)
    with torch.no_grad():
        turns = deepseek.DeepseekV3RotaryEmbedding(config)(x_BTD, torch.tensor(positions_T)[None])
        outputs_BTD, _ = module(x_BTD, turns, torch.full((T, T), float("-inf")).triu(1)[None, None])
    listed = lambda x, digits: np.round(np.asarray(x, np.float64), digits).tolist()
    return {
        **SIZES,
        **case,
        "state": {name: listed(x, 3) for name, x in state.items()},
        "inputs": listed(inputs_BTD, 3),
        "positions": positions_T.tolist(),
        "outputs": listed(outputs_BTD, 7),
    }


if __name__ == "__main__":
    made = {name: attention_case(case, seed) for seed, (name, case) in enumerate(CASES.items())}
    GOLDEN.write_text(json.dumps(made, separators=(",", ":")) + "\n")
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")
