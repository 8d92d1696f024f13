#!/usr/bin/env bash
# What a GPU is needed for: the tests of the contracts on it, and the speed of bases of 0.5 and 7
# billion parameters. Eight minutes on an H200 at most, on a machine with a CUDA torch and without
# network.
#
#     benchmarks/gpu.sh [FOLDER]            # results into FOLDER, by default benchmarks/results
#     WHEELS=DIR benchmarks/gpu.sh FOLDER   # first installs the packages in DIR, beside the others
#     benchmarks/gpu.sh --quick             # tries every part on a CPU, with small bases; stores nothing
#
# Each part has a time limit, and leaves to later ones what it does not need. A part that fails stops
# no other; the exit status is the number of those that failed. The larger base is measured where it
# says something that the smaller one does not; training comes last, since its base in 8 bits takes
# longest to load.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=cuda quick=()
if [ "${1:-}" = --quick ]; then
  device=cpu quick=(--quick)
  shift
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
out=${1:-benchmarks/results}
[ ${#quick[@]} = 0 ] || out=$scratch/results
mkdir -p "$out"
out=$(cd "$out" && pwd)
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
touch "$scratch/began"
exec > >(tee "$out/gpu.log") 2>&1
log=$!

failed=() limit=0
# part NAME SECONDS COMMAND…
part() {
  local name=$1 started=$SECONDS
  limit=$((limit + $2))
  shift 2
  echo "── $name: at most $((limit - SECONDS)) s ──"
  timeout --kill-after=5 "$((limit - SECONDS))" "$@"
  local status=$?
  echo "── $name: $((SECONDS - started)) s, exit status $status ──"
  [ $status = 0 ] || failed+=("$name")
}

# speed NAME SECONDS ROUNDS SHAPE…
speed() {
  local name=$1 seconds=$2 rounds=$3
  shift 3
  part "$name" "$seconds" "$python" "benchmarks/speed/$name.py" --device $device --dtype bfloat16 \
    --shape "$@" --rounds "$rounds" --out "$out" "${quick[@]}"
}

if [ -n "${WHEELS:-}" ]; then
  part packages 15 "$python" -m pip install --quiet --no-index --no-deps --no-compile \
    --no-cache-dir --disable-pip-version-check --root-user-action ignore \
    --target "$scratch/site" "$WHEELS"/*.whl
  export PYTHONPATH=$scratch/site:$PYTHONPATH
fi
part versions 15 "$python" -c '
import sys
from importlib.metadata import PackageNotFoundError, version
import torch
print("python", sys.version.split()[0], "cuda", torch.version.cuda)
for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "pytest"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "MISSING")
for number in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_name(number), torch.cuda.mem_get_info(number))
'

# Warnings are errors on the tested versions only; here are those of the machine.
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(--numprocesses 6 --dist worksteal)
tests=$(grep -rlE 'mark\.contract' tests --include='test_*.py')
if [ ${#quick[@]} != 0 ]; then tests=tests/modeling/test_routing.py workers=(); fi
# With that workspace products of the same matrices give the same bits.
# shellcheck disable=SC2086 # file names
OMP_NUM_THREADS=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 part contract 85 "$python" -m pytest -q -m contract --device $device -W default \
  -p no:benchmark -p no:cacheprovider --durations 8 "${workers[@]}" $tests

speed overhead 85 5 0.5b 7b
speed joint 45 5 0.5b
speed mixed_batch 65 5 0.5b
speed swap 45 5 0.5b
speed evaluation 50 3 0.5b
speed training 90 5 0.5b 7b

echo "── goals ──"
"$python" - "$out" "$scratch/began" << 'END'
import json
import sys
from pathlib import Path

began = Path(sys.argv[2]).stat().st_mtime
for path in sorted(Path(sys.argv[1]).glob("*.json")):
    if path.stat().st_mtime < began:
        continue
    for figure in json.loads(path.read_text(encoding="utf-8"))["figures"]:
        shown = figure["goal"] is not None or "share of" in figure["name"]
        if shown or "MB" in figure["unit"] or "product" in figure["name"]:
            goal = "" if figure["goal"] is None else f"  goal {figure['goal']}"
            mark = {True: " reached", False: " MISSED", None: ""}[figure["reached"]]
            peft = "" if figure["peft"] is None else f", PEFT {figure['peft']:.4g}"
            value = f"{figure['ours']:.4g} {figure['unit']}{peft}"
            print(f"{path.stem.split('-')[0]}: {figure['name']}: {value}{goal}{mark}")
END
echo "$SECONDS s; failed: ${failed[*]:-none}"
exec >&- 2>&-
wait "$log"
exit ${#failed[@]}
