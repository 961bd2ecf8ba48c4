#!/usr/bin/env bash
# All figures of a GPU in one go: the tests that need one, the costs of a step, and a whole quality run. Some minutes on
# one card of 80 GB. It writes benchmarks/results/gpu/*.json, which nobody has committed so far.
#
#     benchmarks/gpu.sh             # installs the package into .venv-gpu first
#     benchmarks/gpu.sh --dry-run   # the same commands on the CPU, with tiny numbers, in this environment
set -euo pipefail
cd "$(dirname "$0")/.."
export TOKENIZERS_PARALLELISM=false

if [ "${1:-}" = --dry-run ]; then
    python=${PYTHON:-python} results=$(mktemp -d) device=cpu test_on=""
    small=(--batch 1 --seq_len 8 --rounds 1 --teachers 2)
    small_run=(--teacher_steps 1 --steps 2 --test_queries 1 --teacher_queries 1)
    bert=minilm llama=minilm
elif [ $# -gt 0 ]; then
    echo "gpu.sh: $1 is unknown; leave it out, or give --dry-run" >&2
    exit 2
else
    python3 -m venv .venv-gpu
    python=.venv-gpu/bin/python results=benchmarks/results/gpu device=cuda test_on=0
    $python -m pip install --quiet --constraint constraints.txt ".[demo,test]"
    $python -c "import torch; assert torch.cuda.is_available(), 'no GPU that torch can use'"
    small=() small_run=()
    bert=bert-base llama=llama-1b
    mkdir -p "$results"
fi

CUDA_VISIBLE_DEVICES=$test_on $python -m pytest -q -m gpu tests/method/test_nonfinite.py

step() {  # NAME ARGUMENTS...
    local name=$1
    shift
    $python benchmarks/stage2_step.py --device $device --output "$results/$name.json" "$@" ${small[@]+"${small[@]}"}
}

many=(--teachers 1 8 32 128)
step bert_float32 --shapes $bert "${many[@]}" --methods student Fuse
step bert_bfloat16 --shapes $bert "${many[@]}" --methods student Fuse --dtype bfloat16
step bert_bfloat16_compiled --shapes $bert "${many[@]}" --methods student --dtype bfloat16 --compile
step llama_lora_bfloat16 --shapes $llama "${many[@]}" --methods student --dtype bfloat16 --config "lora[r=8]"

$python examples/faq_retrieval.py --output_dir "$results/faq_retrieval" ${small_run[@]+"${small_run[@]}"}
cp "$results/faq_retrieval/results.json" "$results/faq_retrieval.json"
echo "The results are in $results."
