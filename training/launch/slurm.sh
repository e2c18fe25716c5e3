#!/bin/bash
# sbatch training/launch/slurm.sh --config my.yaml --run.output_dir /shared/runs/my
#
# Ten minutes before its time is over the job saves and ends; submitted again with the same line, it goes on.
# One task a machine starts a process for each GPU; they find each other at the first machine.
#SBATCH --job-name=hfclip
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log

export FIRST_MACHINE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Jobs of different users may share a machine: the port follows from the job.
export PORT=$((29500 + SLURM_JOB_ID % 1000))
# How long processes may take to save after the signal; 30 seconds otherwise.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
# Slurm before 22.05 does not tell when the job ends; there the signal, two minutes ahead, is all the notice.
if [ -n "$SLURM_JOB_END_TIME" ]; then
    minutes=$(((SLURM_JOB_END_TIME - $(date +%s)) / 60 - 10))
    set -- --stop-after $((minutes > 1 ? minutes : 1)) "$@"
fi

srun bash -c 'accelerate launch --config_file training/launch/nodes.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * 8))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$FIRST_MACHINE" --main_process_port "$PORT" \
    training/pretrain.py "$@" --resume auto' -- "$@"
