#!/usr/bin/env bash
# The checks and benchmarks that need a GPU, one after the other, within nine minutes. Nothing is downloaded.
#
#   OUT=FOLDER PYTHON=python3 WHEELS=FOLDER LIMIT=520 bash experiments/h200/run.sh
#
# PYTHON has jax for the GPU; where other packages of the project are missing, they are installed from the wheels in
# WHEELS. Each step appends one line to OUT/results.jsonl and its output to OUT/log.txt. A step that has succeeded there
# is not run again, and a step that may not end in the time left is put off: the same command goes on. On a fresh machine,
# copy results.jsonl into experiments/h200/ beforehand. The answer is 0 once all steps have succeeded.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OUT=${OUT:-$PWD/runs/h200} PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-520}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_MEM_FRACTION=.8
unset JAX_PLATFORMS
mkdir -p "$OUT"
results=$OUT/results.jsonl log=$OUT/log.txt
[ -e "$results" ] || cp experiments/h200/results.jsonl "$results" 2>/dev/null || : >"$results"

if [ -d "${WHEELS:-}" ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl >>"$log" 2>&1 || echo "wheels were not installed"
fi

unfinished=0
# step NAME SECONDS COMMAND...: SECONDS is the most that it may take.
step() {
  local name=$1 most=$2 start=$SECONDS rc line
  shift 2
  if grep -q "\"step\": \"$name\", \"rc\": 0," "$results"; then echo "$name: done before"; return; fi
  if ((SECONDS + most > LIMIT)); then echo "$name: put off"; unfinished=1; return; fi
  printf '\n>>> %s: %s\n' "$name" "$*" >>"$log"
  timeout "$most" "$@" >"$OUT/last.txt" 2>&1
  rc=$?
  cat "$OUT/last.txt" >>"$log"
  line=$(tail -n 1 "$OUT/last.txt")
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
  echo "$name: rc $rc, $((SECONDS - start)) s"
}

large=(--set model.d_model=1024 --set model.n_heads=16 --set model.d_ff=4096 --set model.compute_dtype=bf16
  --set data.seq_len=1024 --set data.batch_size=16 --set model.remat=true)
device='import jax, json; d = jax.devices()[0]; assert d.platform == "gpu", d
print(json.dumps({"device": d.device_kind, "jax": jax.__version__, "memories": [m.kind for m in d.addressable_memories()]}))'

step device 60 "$PYTHON" -c "$device"
step engine 90 "$PYTHON" experiments/bench_engine.py --rounds 15 --steps 20 --json
step engine-large 120 "$PYTHON" experiments/bench_engine.py --rounds 7 --steps 5 --json "${large[@]}"
step stacks 120 "$PYTHON" experiments/bench_stacks.py step --rounds 11 --steps 20 --json
step stacks-large 150 "$PYTHON" experiments/bench_stacks.py step --rounds 5 --steps 5 --json "${large[@]}" \
  --set cache.host_budget=16GiB
step depth-large 120 "$PYTHON" experiments/bench_stacks.py memory compile --json "${large[@]}"
step markov 150 "$PYTHON" experiments/learn_markov.py --json
rm -rf "$OUT/quickstart"
step quickstart 120 "$PYTHON" -m stackwise_jax.train --config configs/quickstart.yaml --run.dir "$OUT/quickstart" --json
rm -rf "$OUT/quickstart"
# What must hold on any device: frozen parts, resuming, cache and kernels against their references.
step tests-kernels 120 "$PYTHON" -m pytest -q -p no:cacheprovider -m "not slow" tests/test_kernels_attention.py \
  tests/test_kernels_cross_entropy.py tests/test_memory_cache.py tests/test_memory_placement.py
step tests-engine 240 "$PYTHON" -m pytest -q -p no:cacheprovider -m "not slow" tests/test_engine_run.py \
  tests/test_engine_exact.py tests/test_engine_optimizer.py
rm -f "$OUT/last.txt"
exit "$unfinished"
