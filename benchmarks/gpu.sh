#!/usr/bin/env bash
# Everything that needs a GPU, in one command and one file of rows: three groups of at most 6.5 minutes each.
#
#   bash benchmarks/gpu.sh [WHEELS] [--group 1|2|3] [--stages a,b,...] [--out FILE] [--dry-run]
#
#   WHEELS        a folder of wheels of peers, installed without network for this run only; made elsewhere by
#                   pip download --no-deps --only-binary=:all: --python-version 3.11 --platform manylinux_2_28_x86_64 \
#                     --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -r benchmarks/wheels.txt -d WHEELS
#                 and once more with -r benchmarks/wheels-hopper.txt (quack, CuTe's compiler) if they may be large
#   --group N     1 (390 s)  tests flex peers list_loss from_logits accuracy: is it right, and the small questions
#                 2 (390 s)  linear_loss step shared_prefix tune: what it is for
#                 3 (390 s)  kernels pairs memory host_time generation: what says least that a CPU has not said
#                 left out: all three
#   --stages      some of these, in the order given
#   --out FILE    default benchmarks/results/<date>-<gpu>.json; FILE.log gets what the stages print
#   --dry-run     print what would be run, run nothing
#
# A group ends at its limit: what has not begun by then is written down as left out. With a quarter of an hour of a GPU,
# run groups 1 and 2.
#
# Needs Python >= 3.11 with torch, triton, pytest, pytest-benchmark and hypothesis (PYTHON=... picks it), and what
# `pip install .[train]` brings for step, shared_prefix and generation. A stage that fails or runs out of time is
# written down as a row and does not stop the others; the exit status is 1 if any did. A peer that takes the device down
# with it ends its stage's process; the stage goes on without that peer. PERPO_BENCH_COMMIT names the commit in the rows
# where the tree was copied without its history.
# PERPO_BENCH_SMOKE=1 goes through all stages at tiny sizes, on a CPU too, to see that the script works.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
GROUP_S=390
GROUPS_=("" "tests flex peers list_loss from_logits accuracy" "linear_loss step shared_prefix tune" "kernels pairs memory host_time generation")
ALL="${GROUPS_[*]:1}"
groups="1 2 3" stages="" out="" wheels="" dry_run=""

while [ $# -gt 0 ]; do
    case $1 in
        --group)
            case ${2-} in 1 | 2 | 3) ;; *) echo "--group is 1, 2 or 3" >&2; exit 64 ;; esac
            groups=$2; shift ;;
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
if [ -n "$stages" ]; then GROUPS_[0]=$stages groups=0; fi # a group of its own, without a limit

smoke=${PERPO_BENCH_SMOKE:+--tiny}
pytest=("$PYTHON" -m pytest -o addopts= -q -p no:cacheprovider)
bench=("${pytest[@]}" --benchmark-only $smoke --rows "@OUT@")

# name: seconds it may take, then its command
command_of() {
    case $1 in
        tests) seconds=120; cmd=("${pytest[@]}" -m "not slow and not flex" -rfEs tests/gpu) ;;
        flex) seconds=130; cmd=("${pytest[@]}" -m flex -rfEs ${workers[@]+"${workers[@]}"} tests/gpu) ;;
        peers) seconds=50; cmd=("${pytest[@]}" -m "not slow" -rfEs tests/benchmarks/test_peers_agree.py) ;;
        list_loss) seconds=50; cmd=("${bench[@]}" benchmarks/test_list_loss.py) ;;
        from_logits) seconds=90; cmd=("${bench[@]}" benchmarks/test_from_logits.py) ;;
        accuracy) seconds=50; cmd=("${bench[@]}" benchmarks/test_accuracy.py) ;;
        linear_loss) seconds=150; cmd=("${bench[@]}" benchmarks/test_linear_loss.py::test_linear_loss) ;;
        step) seconds=140; cmd=("${bench[@]}" benchmarks/test_step.py) ;;
        shared_prefix) seconds=80; cmd=("${bench[@]}" benchmarks/test_shared_prefix.py) ;;
        tune) seconds=80; cmd=("$PYTHON" -m benchmarks.tune $smoke --rows "@OUT@" --seconds 60) ;;
        kernels) seconds=120; cmd=("${pytest[@]}" -m "not slow" -rfE ${workers[@]+"${workers[@]}"} tests/kernels) ;;
        pairs) seconds=80; cmd=("${bench[@]}" benchmarks/test_linear_loss.py::test_pairs_against_liger_dpo) ;;
        memory) seconds=90; cmd=("${bench[@]}" benchmarks/test_memory.py) ;;
        host_time) seconds=30; cmd=("${bench[@]}" benchmarks/test_host_time.py) ;;
        generation) seconds=120; cmd=("${bench[@]}" benchmarks/test_generation.py) ;;
    esac
}

# With many cores the kernel tests, and those that wait for a compiler, share the GPU; timings have it to themselves.
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
    for group in $groups; do
        [ "$group" = 0 ] || echo "group $group, $GROUP_S s at most:"
        for name in ${GROUPS_[group]}; do
            command_of "$name"
            echo "$name (at most $seconds s): ${cmd[*]//@OUT@/$out}"
        done
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
    install=("$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$scratch/site")
    "${install[@]}" "$wheels"/*.whl || for wheel in "$wheels"/*.whl; do
        "${install[@]}" "$wheel" || echo "could not install $wheel: its peer will be skipped" >&2
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

# note NAME SECONDS STATUS: the stage's row
note() {
    "$PYTHON" -m benchmarks.rows --file "$out" --stage "$1" --seconds "$2" --status "$3" --log "$scratch/log"
}

# run NAME LIMIT: one stage, again from where it was if a peer lost the device
LOST=17 # the exit status of benchmarks/conftest.py then
run() {
    local begin since status left again=()
    begin=$(date +%s) since=$(date -u +%Y-%m-%dT%H:%MZ)
    : >"$scratch/log"
    while left=$((begin + $2 - $(date +%s))); do
        [ "$left" -gt 0 ] || { status=124; break; }
        timeout --kill-after=5 "$left" "${cmd[@]//@OUT@/$out}" ${again[@]+"${again[@]}"} >>"$scratch/log" 2>&1
        status=$?
        [ $status -eq $LOST ] || break
        again=(--resume "$since")
    done
    took=$(($(date +%s) - begin))
    { echo "== $1: status $status after $took s: ${cmd[*]//@OUT@/$out}"; cat "$scratch/log"; } >>"$everything"
    [ $status -eq 0 ] || failed=1
    note "$1" "$took" $status
    tail -n 3 "$scratch/log"
}

began=0 # the first group's clock started with the script
for group in $groups; do
    for name in ${GROUPS_[group]}; do
        command_of "$name"
        if [ -n "$smoke" ]; then
            seconds=$((6 * seconds)) # Triton's interpreter on a busy CPU
        elif [ "$group" != 0 ]; then
            left=$((began + GROUP_S - 5 - SECONDS))
            [ "$seconds" -le "$left" ] || seconds=$left
        fi
        if [ "$seconds" -lt 15 ]; then
            echo "== $name: left out, the group's time is up"
            echo "left out, the time of its group was up" >"$scratch/log"
            note "$name" 0 124
            failed=1
            continue
        fi
        echo "== $name (at most $seconds s)"
        run "$name" "$seconds"
    done
    began=$SECONDS
done

echo
"$PYTHON" -m benchmarks.report --short "$out"
echo "rows: $out; what the stages printed: $everything"
exit $failed
