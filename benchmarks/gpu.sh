#!/usr/bin/env bash
# Everything that needs a GPU, in one command and one file of rows, in 36 minutes at most.
#
#   bash benchmarks/gpu.sh [WHEELS] [--stages a,b,...] [--out FILE] [--dry-run]
#
#   WHEELS        a folder of wheels of peers (Liger, cut-cross-entropy, ...), installed without network for this run only
#   --stages      of: tests kernels tune from_logits list_loss linear_loss pairs shared_prefix step generation accuracy
#                 memory; default all, in this order
#   --out FILE    default benchmarks/results/<date>-<gpu>.json; FILE.log gets what the stages print
#   --dry-run     print what would be run, run nothing
#
# Needs Python >= 3.11 with torch, triton, pytest, pytest-benchmark and hypothesis (PYTHON=... picks it), and what
# `pip install .[train]` brings for shared_prefix, step and generation. A stage that fails or runs out of time is
# written down as a row and does not stop the others; the exit status is 1 if any did.
# PERPO_BENCH_SMOKE=1 goes through all stages at tiny sizes, on a CPU too, to see that the script works.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
ALL="tests kernels tune from_logits list_loss linear_loss pairs shared_prefix step generation accuracy memory"
stages=$ALL out="" wheels="" dry_run=""

while [ $# -gt 0 ]; do
    case $1 in
        --stages) stages=${2//,/ }; shift ;;
        --out) out=$2; shift ;;
        --dry-run) dry_run=1 ;;
        -h | --help) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
        -*) echo "unknown option $1; see --help" >&2; exit 64 ;;
        *) wheels=$1 ;;
    esac
    shift
done
for name in $stages; do
    case " $ALL " in *" $name "*) ;; *) echo "unknown stage $name; stages are: $ALL" >&2; exit 64 ;; esac
done
if [ -n "$wheels" ] && [ ! -d "$wheels" ]; then echo "no folder $wheels" >&2; exit 64; fi

smoke=${PERPO_BENCH_SMOKE:+--tiny}
pytest=("$PYTHON" -m pytest -o addopts= -q -p no:cacheprovider)
bench=("${pytest[@]}" --benchmark-only $smoke --rows "@OUT@")

# name: seconds it may take, then its command
command_of() {
    case $1 in
        tests) seconds=240; cmd=("${pytest[@]}" -rfEs tests/gpu) ;;
        kernels) seconds=180; cmd=("${pytest[@]}" -rfE ${workers[@]+"${workers[@]}"} tests/kernels) ;;
        tune) seconds=190; cmd=("$PYTHON" -m benchmarks.tune $smoke --rows "@OUT@") ;;
        from_logits) seconds=120; cmd=("${bench[@]}" benchmarks/test_from_logits.py) ;;
        list_loss) seconds=70; cmd=("${bench[@]}" benchmarks/test_list_loss.py) ;;
        linear_loss) seconds=220; cmd=("${bench[@]}" benchmarks/test_linear_loss.py::test_linear_loss) ;;
        pairs) seconds=100; cmd=("${bench[@]}" benchmarks/test_linear_loss.py::test_pairs_against_liger_dpo) ;;
        shared_prefix) seconds=150; cmd=("${bench[@]}" benchmarks/test_shared_prefix.py) ;;
        step) seconds=420; cmd=("${bench[@]}" benchmarks/test_step.py) ;;
        generation) seconds=240; cmd=("${bench[@]}" benchmarks/test_generation.py) ;;
        accuracy) seconds=90; cmd=("${bench[@]}" benchmarks/test_accuracy.py) ;;
        memory) seconds=140; cmd=("${bench[@]}" benchmarks/test_memory.py) ;;
    esac
}

# With many cores the kernel tests share the GPU; the GPU tests and timings have it to themselves.
workers=()
if [ "$(nproc)" -ge 8 ] && "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 6); fi

gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>/dev/null) || {
    echo "$PYTHON has no torch; set PYTHON to one that has" >&2
    exit 2
}
out=${out:-$("$PYTHON" -m benchmarks.rows)}

if [ -n "$dry_run" ]; then
    echo "would write ${out}"
    [ -z "$wheels" ] || echo "would install, for this run only: $(ls "$wheels")"
    for name in $stages; do
        command_of "$name"
        echo "$name (at most $seconds s): ${cmd[*]//@OUT@/$out}"
    done
fi
if [ -z "$gpu" ] && [ -z "$smoke" ]; then
    echo "no CUDA device: nothing was run (PERPO_BENCH_SMOKE=1 tries the script itself on a CPU)" >&2
    exit 2
fi
[ -z "$dry_run" ] || exit 0
[ -n "$gpu" ] || export TRITON_INTERPRET=1 # read when the kernels are defined

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -n "$wheels" ]; then
    for wheel in "$wheels"/*.whl; do
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$scratch/site" "$wheel" ||
            echo "could not install $wheel: its peer will be skipped" >&2
    done
    export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
fi
mkdir -p "$(dirname "$out")"
out=$(cd "$(dirname "$out")" && pwd)/$(basename "$out")
everything=$out.log
failed=0
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# large buffers of different sizes come and go: without this the allocator's fragments look like memory that is needed
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

for name in $stages; do
    command_of "$name"
    [ -z "$smoke" ] || seconds=$((6 * seconds)) # Triton's interpreter on a busy CPU
    echo "== $name (at most $seconds s)"
    begin=$(date +%s)
    timeout --kill-after=10 "$seconds" "${cmd[@]//@OUT@/$out}" >"$scratch/log" 2>&1
    status=$?
    took=$(($(date +%s) - begin))
    { echo "== $name: status $status after $took s: ${cmd[*]//@OUT@/$out}"; cat "$scratch/log"; } >>"$everything"
    [ $status -eq 0 ] || failed=1
    "$PYTHON" -m benchmarks.rows --file "$out" --stage "$name" --seconds "$took" --status $status --log "$scratch/log"
    tail -n 3 "$scratch/log"
done

echo
"$PYTHON" -m benchmarks.report --short "$out"
echo "rows: $out; what the stages printed: $everything"
exit $failed
