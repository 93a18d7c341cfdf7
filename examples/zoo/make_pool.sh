#!/bin/sh
# Make the weights of an embedded pool from nothing: two to fifteen minutes on two idle cores, see README.md.
# Usage: [PYTHON=…] ./make_pool.sh tiny8|tiny8_hard|tiny20 [FOLDER]
#   FOLDER  default outputs/POOL; compare it with fusion_merge/zoo/weights/POOL afterwards, or copy it there
#   PYTHON  one that has fusion_merge[tiny8] installed, such as .venv/bin/python; default: python
set -eu
here=$(cd "$(dirname "$0")" && pwd)
pool=${1:?which pool? tiny8, tiny8_hard or tiny20}
out=${2:-outputs/$pool}
PYTHON=${PYTHON:-python}

case $pool in
tiny8) tasks=tiny8 lr=0.0005 warmup=50 steps=600 batch=64 ;;
tiny8_hard) tasks=tiny8 lr=0.002 warmup=10 steps=40 batch=32 ;;
tiny20) tasks=tiny20 lr=0.0005 warmup=50 steps=300 batch=64 ;;
*) echo "there is no recipe of the pool $pool; choose tiny8, tiny8_hard or tiny20" >&2 && exit 2 ;;
esac

"$PYTHON" "$here/pretrain.py" "$pool" "$out/pretrained"

"$PYTHON" -m fusion_merge method=clip_finetune method.output="$out" method.dtype=float16 method.weight_decay=0.01 \
    method.lr=$lr method.warmup_steps=$warmup method.max_steps=$steps method.batch_size=$batch 'baselines=[zero_shot]' \
    modelpool=clip_vision "modelpool.models={_pretrained_: $out/pretrained}" \
    +dataset@modelpool.train_datasets=${tasks}_train +dataset@modelpool.test_datasets=${tasks}_test
