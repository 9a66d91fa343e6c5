#!/usr/bin/env bash
# bash launch_train.sh options/....json [num_gpus] [more arguments of main_train_vrt.py]
# Starts one process per GPU under torchrun; without a number, one for each GPU here (one process without GPUs).
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: bash launch_train.sh options/....json [num_gpus]" >&2
    exit 2
fi
python=${PYTHON:-python}
options=$1
num=${2:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$num" \
    "$(dirname "$0")/main_train_vrt.py" --opt "$options" "${@:3}"
