#!/usr/bin/env bash
# Checks and measures the GPU kernels and the engine on this machine, in place: it needs python 3.11 or newer with torch, triton,
# transformers and pytest, and nvcc 13; no network, and no installed package of ours. PYTHON names another python; SHAPES the
# models that the engine is measured on ("1b 8b", which takes 20 GB of disk; "" leaves them out).
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
PATH=$PATH:/usr/local/cuda/bin
export PYTHONPATH=packages/cacheflow-kernels/src PYTHONUNBUFFERED=1
read -ra shapes <<<"${SHAPES-1b 8b}"
metadata=$(mktemp -d)
trap 'rm -rf "$metadata"' EXIT

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "benchmarks/gpu.sh: torch finds no CUDA GPU here; nothing was checked or measured." >&2
    exit 1
fi

# The repository's own settings for pytest want plugins that this machine may lack.
run_tests() {
    local options=(-c /dev/null --rootdir=. "--confcutdir=$1" --import-mode=importlib -p no:cacheprovider -q)
    # Most of the time goes into compiling Triton kernels.
    if "$python" -c 'import xdist' 2>/dev/null; then options+=(-n 8); fi
    "$python" -m pytest "${options[@]}" "$1"
}
# Memory comes straight from CUDA, so that each tensor's end is an end.
sanitize() {
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 "$python" benchmarks/every_cuda_kernel.py
}

checks=()
check() {
    local name=$1
    shift
    echo "== $name"
    if "$@"; then checks+=("$name=passed"); else checks+=("$name=failed"); fi
}

check compile "$python" packages/cacheflow-kernels/compile_kernels.py cuda
check tests run_tests tests/kernels/gpu
check kernels "$python" benchmarks/every_cuda_kernel.py
if command -v compute-sanitizer >/dev/null; then
    check memcheck sanitize memcheck
    check racecheck sanitize racecheck
else
    checks+=("memcheck=left out, no compute-sanitizer" "racecheck=left out, no compute-sanitizer")
fi
in_place=$("$python" benchmarks/in_place.py "$metadata")
PYTHONPATH=$in_place check engine run_tests tests/gpu
check benchmarks "$python" benchmarks/bench_gpu.py --checks "${checks[@]}"
if [[ ${#shapes[@]} -gt 0 ]]; then
    PYTHONPATH=$in_place check "engine benchmarks" "$python" benchmarks/bench_gpu_engine.py --shape "${shapes[@]}" \
        --output benchmarks/results/gpu-engine.jsonl
fi

printf '== %s\n' "${checks[@]}"
[[ " ${checks[*]} " != *"=failed"* ]]
