#!/usr/bin/env bash
# Runs a small grid of samples through the profile for Slurm, kills one of its jobs, starts again, and holds what is
# stored in the end against what an undisturbed run stores. By hand, after `make plan`:
#
#   workflow/slurm_check.sh           on a machine that hands jobs to a Slurm; more options of snakemake may follow,
#                                     such as --default-resources slurm_account=... slurm_partition=...
#   workflow/slurm_check.sh local     as root on Debian: with a Slurm of this one machine, which it starts and stops;
#                                     needs the packages slurm-wlm and munge
#
# PATH must find snakemake and Slurm's commands. Takes about ten minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
options=(--profile workflow/profiles/slurm --config grid=workflow/samples.yaml)

start_slurm() {
  local host memory
  # Jobs look for it there: what the environment says of Slurm does not reach them.
  mkdir -p /etc/slurm
  ln -s "$work/slurm.conf" /etc/slurm/slurm.conf || { echo "this machine has a Slurm already: leave out local" >&2; exit 1; }
  host=$(hostname -s)
  memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
  mkdir -p "$work/ctld" "$work/d" /run/munge
  chown munge:munge /run/munge
  # No accounting: a database would be needed. So squeue tells what becomes of a job.
  cat >"$work/slurm.conf" <<EOF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$work/ctld
SlurmdSpoolDir=$work/d
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/ctld.log
SlurmdLogFile=$work/d.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc --all) RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
EOF
  munge -n >/dev/null 2>&1 || runuser -u munge -- munged --force
  slurmctld
  sleep 2
  slurmd
  options+=(--slurm-no-account --slurm-status-command squeue --default-resources slurm_partition=main)
  options+=(--slurm-init-seconds-before-status-checks 5)
}

# Stops what was started; the stores stay where something went wrong.
finish() {
  local status=$?
  for daemon in slurmd slurmctld; do
    [ ! -s "$work/$daemon.pid" ] || kill "$(cat "$work/$daemon.pid")" || true
  done
  [ "$(readlink /etc/slurm/slurm.conf)" != "$work/slurm.conf" ] || rm /etc/slurm/slurm.conf
  sleep 2 # until they have gone
  [ $status != 0 ] || rm -r "$work"
}

# Runs the grid into a store of its own, with further options.
run() {
  EXPVAE_RUNS=$work/$1/runs EXPVAE_CACHE=$work/$1/cache snakemake "${options[@]}" "${@:2}"
}

trap finish EXIT
if [ "${1:-}" = local ]; then
  shift
  start_slurm
fi
options+=("$@")

echo "1. Undisturbed."
run whole

echo "2. A job is killed while it trains."
rm -f _build/grid/longer.log
run killed --restart-times 0 &
snakemake=$!
until grep -qs "Executing notebook" _build/grid/longer.log; do
  kill -0 $snakemake # it has not ended before
  sleep 1
done
sleep 10
scancel --signal=KILL --full "$(squeue -h -t R -o '%i %k' | awk '/longer/ {print $1}')"
if wait $snakemake; then
  echo "snakemake did not notice that a job was killed" >&2
  exit 1
fi

echo "3. Started again."
run killed

python - "$work/whole/runs" "$work/killed/runs" <<'EOF'
import os
import sys

import numpy as np

from expvae_book import runs

stored = []
for store in sys.argv[1:]:
    os.environ["EXPVAE_RUNS"] = store
    stored.append({run.folder.relative_to(store): (run, run.arrays) for run in runs.find()})
whole, killed = stored
assert whole.keys() == killed.keys(), f"stored are {sorted(whole)} and {sorted(killed)}"
for folder, (run, arrays) in whole.items():
    other, others = killed[folder]
    for part in ("metrics", "losses", "budget", "parameters"):
        assert run.record[part] == other.record[part], f"{folder}: {part} differ"
    assert arrays.keys() == others.keys(), f"{folder}: other arrays"
    for name, values in arrays.items():
        # Where a measure has no value, as of images without anything anomalous, it is NaN in both.
        assert np.array_equal(values, others[name], equal_nan=True), f"{folder}: {name} differ"
print(f"All {len(whole)} records are there, and equal those of the undisturbed run.")
EOF
