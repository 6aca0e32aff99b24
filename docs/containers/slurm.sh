#!/bin/sh
# One federation on one node, several clients at a time, which goes on where it was when its time is over or its node dies:
#   sbatch slurm.sh mine.yaml
#SBATCH --job-name=fedtune
#SBATCH --cpus-per-task=8
#SBATCH --gpus=1
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
set -eu
out=runs/$(basename "$1" .yaml)-$SLURM_JOB_ID
if test -e "$out"; then way=--resume; else way=--out; fi
status=0
srun fedtune run "$1" transport.workers=auto "$way" "$out" --log-format json || status=$?
if test "$status" -eq 143; then   # SIGTERM, 180 s before the end: checkpoint and summary are written
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
