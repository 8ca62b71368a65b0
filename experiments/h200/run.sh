#!/usr/bin/env bash
# The checks and benchmarks that need a GPU, one after the other, as many as fit into nine minutes. Nothing is downloaded.
#
#   OUT=FOLDER RUNS=FOLDER PYTHON=python3 WHEELS=FOLDER TEXT=FILE LIMIT=520 bash experiments/h200/run.sh [--tiny] [NAME ..]
#
# NAME: steps whose names begin with it (70b, 8b, tests, ..); none: all. PYTHON has jax for the GPU; where other packages of
# the project are missing, they are installed from the wheels in WHEELS: those of `pip download --no-deps --only-binary
# :all: --python-version 3.12 -d WHEELS grain array_record portpicker tensorboardX` and of what else is
# missing. TEXT: what the 70B curriculum is trained on; without it on the documentation of Python. Each step prints one
# line of JSON as soon as it has ended, also to OUT/results.jsonl, and its output to OUT/log.txt. A step that has succeeded
# there is not run again, and a step that may not end in the time left is put off: the same command goes on. On a fresh
# machine, copy results.jsonl into experiments/h200/ beforehand. RUNS holds what a step goes on from; it has to survive
# from one command to the next. The answer is 0 once all steps have succeeded.
#
# --tiny: everything on the CPU at the smallest sizes, in minutes, beginning anew: shows that no step fails on a typo.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tiny=0
if [ "${1:-}" = --tiny ]; then tiny=1; shift; fi
wanted=("$@")
if ((tiny)); then
  OUT=${OUT:-$PWD/runs/h200-tiny} LIMIT=${LIMIT:-3000}
  export JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1
  rm -f "$OUT/results.jsonl" "$OUT/log.txt"
else
  OUT=${OUT:-$PWD/runs/h200} LIMIT=${LIMIT:-520}
  unset JAX_PLATFORMS
fi
RUNS=${RUNS:-$OUT/runs} PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p "$OUT" "$RUNS"
results=$OUT/results.jsonl log=$OUT/log.txt
if [ ! -e "$results" ]; then
  if ((tiny)) || ! cp experiments/h200/results.jsonl "$results" 2>/dev/null; then : >"$results"; fi
fi

if [ -d "${WHEELS:-}" ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl >>"$log" 2>&1 || echo "wheels were not installed"
fi

unfinished=0
chosen() { # whether a step was asked for
  ((${#wanted[@]} == 0)) && return 0
  local name
  for name in "${wanted[@]}"; do [[ $1 == "$name"* ]] && return 0; done
  return 1
}
# step NAME SECONDS COMMAND...: SECONDS is the most that it may take.
step() {
  local name=$1 most=$2 start=$SECONDS rc line
  shift 2
  chosen "$name" || return 0
  if grep -q "\"step\": \"$name\", \"rc\": 0," "$results"; then echo "$name: done before"; return; fi
  if ((SECONDS + most > LIMIT)); then echo "$name: put off"; unfinished=1; return; fi
  printf '\n>>> %s: %s\n' "$name" "$*" >>"$log"
  timeout "$most" "$@" >"$OUT/last.txt" 2>"$OUT/errors.txt"
  rc=$?
  cat "$OUT/errors.txt" "$OUT/last.txt" >>"$log"
  line=$(tail -n 1 "$OUT/last.txt")
  [ -n "$line" ] || line=$(tail -n 1 "$OUT/errors.txt")
  # A last line that is no JSON is kept as text.
  "$PYTHON" - "$name" "$rc" "$((SECONDS - start))" "$line" >>"$results" <<'PYTHON_END'
import json, sys

name, rc, seconds, line = sys.argv[1:]
try:
    answer = json.loads(line)
except ValueError:
    answer = line
print(json.dumps({"step": name, "rc": int(rc), "seconds": int(seconds), "answer": answer}))
PYTHON_END
  ((rc == 0)) || unfinished=1
  tail -n 1 "$results"
}

# Sizes. A geometry is that of a configuration file; its _dry variant has the same depth at small widths.
synthetic=(--set data.source=synthetic --set tokenizer.kind=bytes)
smoke=() rounds=(--rounds 3 --steps 3) vocabularies=(32000 128256) seventy=llama_70b_h200.yaml seven=llama_7b_24gb.yaml
large=(--set model.d_model=1024 --set model.n_heads=16 --set model.d_ff=4096 --set model.compute_dtype=bf16
  --set data.seq_len=1024 --set data.batch_size=16 --set model.remat=true)
eight=(--set model.n_kv_heads=8 --set model.d_ff=14336 --set model.vocab_size=128256 --set data.seq_len=4096)
ladder=(--config llama_1b_t4.yaml --set optimizer.name=adamw) pytest=(-m "not slow") test_depths=(--depths 12 48 96)
attention=(--lengths 512 2048 8192 32768)
curriculum=(--set curriculum.steps="${STEPS:-16}" --set data.batch_size=4) streamed=(--batches 1 2 4 8)
stacks=8 block_counts=(1 2 4) matrix=(--tokens 16384 --inputs 8192 --outputs 28672) stack_trunk=9 quick=() platform=gpu
if ((tiny)); then
  smoke=(--smoke) rounds=(--rounds 1 --steps 1) vocabularies=(512) large=() eight=(--set model.vocab_size=1024)
  seventy=llama_70b_h200_dry.yaml seven=llama_7b_24gb_dry.yaml ladder=() pytest=(--collect-only) test_depths=()
  curriculum=(--set model.architecture.n_stacks=8) streamed=() platform=cpu attention=()
  stacks=2 block_counts=(1 2) matrix=(--smoke) stack_trunk=3 synthetic+=(--set data.synthetic_tokens=4000)
  quick=(--data.source synthetic --data.synthetic_tokens 20000 --data.seq_len 16 --data.batch_size 4 --model.d_model 16
    --model.n_heads 2 --model.d_ff 32 --curriculum.steps 3 --run.eval_batches 1 --run.sample_tokens 2)
fi

device='import jax, json, sys; d = jax.devices()[0]; assert d.platform == sys.argv[1], d
print(json.dumps({"device": d.device_kind, "jax": jax.__version__, "memories": [m.kind for m in d.addressable_memories()]}))'
step device 60 "$PYTHON" -c "$device" "$platform"

# One stack of the 70B geometry over a cached prefix: goals < 35 GB and >= 395 TFLOP/s, stretch 570.
one_phase=("$PYTHON" experiments/one_phase.py "${rounds[@]}" "${synthetic[@]}" --peak_tflops 989 --json)
stack=(--config "$seventy" --set curriculum.plan=stackwise --set model.param_dtype=bf16 --set optimizer.rounding=stochastic)
for blocks in "${block_counts[@]}"; do
  remat=$([ $blocks = 1 ] && echo false || echo true)
  for vocabulary in "${vocabularies[@]}"; do
    for head in auto never; do
      step "70b-stack-$blocks-blocks-$vocabulary-head-$([ $head = auto ] && echo learns || echo frozen)" 120 \
        "${one_phase[@]}" "${stack[@]}" --set model.architecture.n_stacks=2 \
        --set model.architecture.blocks_per_stack=$blocks --set model.remat="$remat" \
        --set model.vocab_size="$vocabulary" --set curriculum.train_head=$head --set cache.kind=host
    done
  done
done
# The same over fresh tokens, which pass a trunk that waits in host memory.
for format in fp8 nf4; do
  step "70b-trunk-$format" 150 "${one_phase[@]}" "${stack[@]}" --set model.architecture.n_stacks=$stack_trunk \
    --set curriculum.frozen=$format --set cache.kind=recompute --set memory.offload=trunk
done

# The 8B geometry end to end: goal 57.8 % of 989 TFLOP/s resident.
step 8b-rackwise-resident 240 "${one_phase[@]}" --config "$seven" "${eight[@]}" --set memory.offload=none \
  --set optimizer.name=adamw --set optimizer.rounding=nearest
step 8b-rackwise-streamed 240 "${one_phase[@]}" --config "$seven" "${eight[@]}"

step streamed 240 "$PYTHON" experiments/bench_streamed.py --config "$seven" --stacks $stacks --json "${smoke[@]}" \
  "${streamed[@]}" "${synthetic[@]}"
step quantized 120 "$PYTHON" experiments/bench_quantized.py --json "${matrix[@]}"
for way in "rackwise resident" "rackwise streamed" "stackwise cached" "stackwise streamed trunk"; do
  step "memory-${way// /-}" 150 "$PYTHON" experiments/bench_memory.py --json "${smoke[@]}" --only "$way" \
    "${test_depths[@]}" "${large[@]}"
done
step ladder-end-to-end 240 "$PYTHON" experiments/memory_ladder.py --json "${smoke[@]}" "${ladder[@]}" "${synthetic[@]}" \
  --only 0 1 2 3 4 5 6 7 8
step ladder-one-stack 200 "$PYTHON" experiments/memory_ladder.py --json "${smoke[@]}" "${ladder[@]}" "${synthetic[@]}" \
  --only 9 10 11 12 13

# Implementations of attention: goals: no slower than cuDNN where it applies, twice as fast as XLA elsewhere.
bench_attention=("$PYTHON" experiments/bench_attention.py --peak_tflops 989 --json "${smoke[@]}")
for shape in gqa mla; do
  step "attention-$shape" 300 "${bench_attention[@]}" specs --specs $shape-4k $shape-16k
done
step attention-lengths 300 "${bench_attention[@]}" lengths "${attention[@]}"
for shape in gqa mla; do
  step "attention-tiles-$shape" 400 "${bench_attention[@]}" tiles --specs $shape-4k --rounds 3
done

# What must hold on any device: frozen parts, resuming, cache, kernels against their references, streamed as resident.
# The tests compare bits and fp32 products.
exact=(env JAX_DEFAULT_MATMUL_PRECISION=highest XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_deterministic_ops=true")
step tests-kernels 120 "${exact[@]}" "$PYTHON" -m pytest -q -p no:cacheprovider "${pytest[@]}" tests/test_kernels_attention.py \
  tests/test_kernels_cross_entropy.py tests/test_memory_cache.py tests/test_memory_placement.py
step tests-pallas 300 "${exact[@]}" "$PYTHON" -m pytest -q -p no:cacheprovider "${pytest[@]}" tests/test_kernels_pallas.py \
  tests/test_kernels_feature_attention.py
step tests-memory 240 "${exact[@]}" "$PYTHON" -m pytest -q -p no:cacheprovider "${pytest[@]}" tests/test_memory_quantized.py \
  tests/test_model_quantized.py tests/test_engine_streamed.py tests/test_memory_offload.py tests/test_engine_update.py
step tests-engine 240 "${exact[@]}" "$PYTHON" -m pytest -q -p no:cacheprovider "${pytest[@]}" tests/test_engine_run.py \
  tests/test_engine_exact.py tests/test_engine_optimizer.py

step engine 90 "$PYTHON" experiments/bench_engine.py --rounds 15 --steps 20 --json "${smoke[@]}"
step engine-large 120 "$PYTHON" experiments/bench_engine.py --rounds 7 --steps 5 --json "${smoke[@]}" "${large[@]}"
step stacks 120 "$PYTHON" experiments/bench_stacks.py step --rounds 11 --steps 20 --json "${smoke[@]}"
step stacks-large 150 "$PYTHON" experiments/bench_stacks.py step --rounds 5 --steps 5 --json "${smoke[@]}" "${large[@]}" \
  --set cache.host_budget=16GiB
step depth-large 120 "$PYTHON" experiments/bench_stacks.py memory compile --json "${smoke[@]}" "${large[@]}"
step markov 150 "$PYTHON" experiments/learn_markov.py --json "${smoke[@]}"
rm -rf "$RUNS/quickstart"
step quickstart 120 "$PYTHON" -m stackwise_jax.train --config configs/quickstart.yaml --run.dir "$RUNS/quickstart" --json \
  "${quick[@]}"
rm -rf "$RUNS/quickstart"

# All 80 stacks from random weights, 16 steps of 8192 tokens each: goals < 35 GB device, < 100 GiB host. It takes several
# commands: each takes what is left of its time, and 3 as its exit code means that there is more to do.
text=(--set data.source=python-docs)
[ -z "${TEXT:-}" ] || text=(--set data.source=text --set data.path="$TEXT")
((tiny)) && text=("${synthetic[@]}")
walk() { # walk SECONDS GRACE: the time of the command, and how much of it is for saving and stopping
  step 70b-curriculum "$1" "$PYTHON" experiments/h200/curriculum.py --config "configs/$seventy" --dir "$RUNS/70b" \
    --seconds $(($1 - 10)) --grace "$2" --set tokenizer.kind=bytes "${text[@]}" --set run.eval_batches=1 \
    --set run.tensorboard=false --set run.sample_tokens=0 "${curriculum[@]}"
}
if ((tiny)) && chosen 70b-curriculum; then
  rm -rf "$RUNS/70b"
  before=$unfinished
  walk 90 65 # stopped on the way: the next goes on
  unfinished=$before
fi
left=$((LIMIT - SECONDS))
((left > 570)) && left=570
((left > 150)) || left=150
walk $left 60
rm -f "$OUT/last.txt" "$OUT/errors.txt"
exit "$unfinished"
