#!/bin/bash
# sbatch training/launch/slurm.sh --config my.yaml --run.output_dir /shared/runs/my
#
# Two minutes before its time is over the job saves and ends; submitted again with the same line, it goes on.
#SBATCH --job-name=hfclip
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log

export FIRST_MACHINE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun bash -c 'accelerate launch --config_file training/launch/nodes.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * 8))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$FIRST_MACHINE" \
    training/pretrain.py "$@" --resume auto' -- "$@"
