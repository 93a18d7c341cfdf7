#!/bin/sh
# Make the weights of the embedded pool from nothing: seven minutes on two idle cores.
# Usage: [PYTHON=…] ./make_tiny8.sh [FOLDER]
#   FOLDER  default outputs/tiny8; compare it with fusion_merge/zoo/weights/tiny8 afterwards, or copy it there
#   PYTHON  one that has fusion_merge[tiny8] installed, such as .venv/bin/python; default: python
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-outputs/tiny8}
PYTHON=${PYTHON:-python}

"$PYTHON" "$here/pretrain.py" "$out/pretrained"

"$PYTHON" -m fusion_merge method=clip_finetune method.output="$out" method.dtype=float16 \
    method.lr=0.0005 method.weight_decay=0.01 method.warmup_steps=50 method.max_steps=600 method.batch_size=64 \
    'baselines=[zero_shot]' "modelpool.models._pretrained_=$out/pretrained"
