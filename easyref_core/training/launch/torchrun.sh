#!/usr/bin/env bash
# Four nodes of eight GPUs by torchrun, each GPU with all weights. On every node, with its number and the first node's address:
#
#     bash easyref_core/training/launch/torchrun.sh 0 node0 CONFIG.yaml [key=value ...]
#
# NODES and GPUS set other numbers. CONFIG.yaml, its rows, images, models and output must be on a folder that all nodes share.
set -euo pipefail
rank=$1 main=$2
shift 2
export ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-bf16}
# seconds for saving a state after SIGTERM; torch 2.13 reads it, older ones may wait for 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
exec torchrun --nnodes "${NODES:-4}" --nproc-per-node "${GPUS:-8}" --node-rank "$rank" \
    --master-addr "$main" --master-port "${PORT:-29500}" -m easyref_core.training "$@"
