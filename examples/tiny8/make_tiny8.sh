#!/bin/sh
# Make the weights of the embedded pool from nothing: about a quarter of an hour on two idle cores.
# Usage: ./make_tiny8.sh [FOLDER]   (then compare FOLDER with fusion_merge/zoo/weights/tiny8, or copy it there)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-outputs/tiny8}

python "$here/pretrain.py" "$out/pretrained"

fusion_merge method=clip_finetune method.output="$out" method.dtype=float16 \
    method.lr=0.0005 method.weight_decay=0.01 method.warmup_steps=50 method.max_steps=600 method.batch_size=64 \
    'baselines=[zero_shot]' "modelpool.models._pretrained_=$out/pretrained"
