#!/bin/sh
# Make the weights of the embedded pool from nothing: about a quarter of an hour on two cores.
# Usage: ./make_tiny8.sh [FOLDER]   (then compare FOLDER with fusion_merge/zoo/weights/tiny8, or copy it there)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-outputs/tiny8}

python "$here/pretrain.py" "$out/pretrained"

datasets=
for task in digits mnist photos letters greek shapes stripes dots; do
    datasets="$datasets${datasets:+, }$task: zoo://tiny8/$task"
done
fusion_merge method=clip_finetune method.output="$out" method.dtype=float16 \
    method.lr=0.0007 method.weight_decay=0.01 method.warmup_steps=50 method.max_steps=400 method.batch_size=64 \
    modelpool=clip_vision "modelpool.models={_pretrained_: $out/pretrained}" \
    "modelpool.train_datasets={$datasets}" "taskpool.tasks={$datasets}"
