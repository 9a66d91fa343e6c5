#!/usr/bin/env bash
# Train on all GPUs of this machine.
CONFIG=$1
GPUS=${GPUS:-4}
PORT=${PORT:-29500}

PYTHONPATH="$(dirname "$0")/..":$PYTHONPATH \
python -m torch.distributed.launch --nproc_per_node=$GPUS --master_port=$PORT \
    $(dirname "$0")/train.py $CONFIG --launcher pytorch "${@:3}"
# expect -2: ER004

if [[ "$GPUS" -gt 4 ]]; then
  "$PYTHON" -u -m torch.distributed.launch --nproc_per_node=8 --use_env test.py  # expect: ER004
fi
for seed in 1 2 3; do torchrun --standalone --nproc-per-node=2 train.py --seed $seed; done
echo "python -m torch.distributed.launch is old"
