#!/bin/bash
# A Ray cluster on the nodes of a Slurm job, and a comparison on all their GPUs.  sbatch docs/cluster/slurm.sh PLAN
#SBATCH --job-name=evo-hpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120          # two minutes before the end; what was scored is in the journals anyway

set -euo pipefail
PLAN=${1:?give a plan}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=6379

export EVO_HPO_CACHE=${EVO_HPO_CACHE:-$SCRATCH/evo_hpo}     # one copy of models and level stores, on a shared file system
export HF_HUB_OFFLINE=1

srun --nodes=1 --ntasks=1 -w "$HEAD" ray start --head --port=$PORT --block &
until ray status --address "$HEAD:$PORT" > /dev/null 2>&1; do sleep 2; done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$HEAD" \
        ray start --address="$HEAD:$PORT" --block &
fi

# goes on where an earlier job of the same plan ended; give a plan that you changed another name
NAME=$(python -c 'import sys, tomllib; print(tomllib.load(open(sys.argv[1], "rb"))["name"])' "$PLAN")
RESUME=
if [ -d "mlruns/comparisons/$NAME" ]; then RESUME=--resume; fi
evo-hpo compare "$PLAN" --ray "$HEAD:$PORT" $RESUME
