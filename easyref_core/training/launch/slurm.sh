#!/usr/bin/env bash
# Four nodes of eight GPUs by SLURM, under any of the YAMLs of this folder:
#
#     sbatch easyref_core/training/launch/slurm.sh easyref_core/training/launch/zero2.yaml CONFIG.yaml [key=value ...]
#
# Submit it from the repository's folder. CONFIG.yaml, its rows, images, models and output must be on a folder that all nodes share.
# Ten minutes before the time limit the run saves its state and ends; the same command continues it, and one that is finished does
# nothing, so it can be submitted several times at once, with --dependency=singleton.
#SBATCH --job-name=easyref
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --open-mode=append
set -euo pipefail
export LAUNCH=$1 GPUS=${SLURM_GPUS_ON_NODE:-8}
shift
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN=${hosts%%$'\n'*} # not through head, which ends scontrol by SIGPIPE, and pipefail then the job
# seconds for saving a state after SIGTERM; torch 2.13 reads it, older ones may wait for 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-570}
# SLURM_NODEID differs on every node, so it is read there
# shellcheck disable=SC2016
srun bash -c 'exec accelerate launch --config_file "$LAUNCH" --num_machines "$SLURM_NNODES" \
    --num_processes "$((SLURM_NNODES * GPUS))" --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN" \
    --main_process_port "${PORT:-29500}" -m easyref_core.training "$@"' easyref "$@"
