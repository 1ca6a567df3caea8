#!/usr/bin/env bash
# A real SLURM on this machine, for the tests: one node, loopback only, nothing outside one folder.
#
#   bash tests/slurm/cluster.sh check                      say what is missing (exit code 1), or nothing
#   bash tests/slurm/cluster.sh start FOLDER [line ...]    start munged, slurmctld and slurmd; further lines for slurm.conf
#   SLURM_CONF=FOLDER/etc/slurm.conf sinfo                 use it
#   bash tests/slurm/cluster.sh stop FOLDER                cancel all jobs, stop the daemons, leave the logs
#
# Needs root and Debian's packages: apt-get install -y --no-install-recommends slurm-wlm munge
# FOLDER must have a short name: a socket's path has at most 107 characters.
set -euo pipefail

die() { echo "error: $*" >&2; exit 1; }

check() {
  local missing=() program
  for program in munged slurmctld slurmd sbatch scontrol; do
    command -v "$program" > /dev/null || missing+=("$program")
  done
  ((${#missing[@]} == 0)) || die "not installed: ${missing[*]} (apt-get install -y --no-install-recommends slurm-wlm munge)"
  [ "$(id -u)" = 0 ] || die "slurmd needs root"
}

# wait_for DAEMON COMMAND...: until the command succeeds; not longer than a minute, or than the daemon lives
wait_for() {
  local name=$1 tries=0
  shift
  until "$@" > /dev/null 2>&1; do
    if ((++tries > 600)) || ! kill -0 "$(< "$folder/run/$name.pid")" 2> /dev/null; then
      tail -n 5 "$folder"/log/*.out >&2
      (stop) || true
      die "$name did not come up; logs: $folder/log"
    fi
    sleep 0.1
  done
}

is_idle() { [ "$(sinfo -h -o %T)" = idle ]; }
answers() { munge -S "$folder/munge/socket" -n | unmunge -S "$folder/munge/socket"; }

# daemon NAME COMMAND...: in the background, its process id in FOLDER/run/NAME.pid
daemon() {
  local name=$1
  shift
  setsid "$@" > "$folder/log/$name.out" 2>&1 < /dev/null &
  echo $! > "$folder/run/$name.pid"
}

start() {
  check
  mkdir -p "$folder"/{munge,etc,state,spool,log,run}
  chmod 755 "$folder" # munged wants its socket to be within everyone's reach
  head -c 1024 /dev/urandom > "$folder/munge/key"
  chmod 400 "$folder/munge/key"
  # Ports that are free now: one for each daemon, and a range for srun.
  read -r ctld_port slurmd_port < <(python3 -c '
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in held))')
  cat > "$folder/etc/slurm.conf" <<CONF
ClusterName=t
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort=$ctld_port
SlurmdPort=$slurmd_port
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/run/slurmctld.own.pid
SlurmdPidFile=$folder/run/slurmd.own.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MailProg=/bin/true
KillWait=10
MinJobAge=3600
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000
$(printf '%s\n' "$@")
CONF
  grep -q '^PartitionName=' "$folder/etc/slurm.conf" ||
    echo "PartitionName=all Nodes=localhost Default=YES DefMemPerNode=100 MaxTime=INFINITE State=UP" >> "$folder/etc/slurm.conf"
  export SLURM_CONF="$folder/etc/slurm.conf"
  daemon munged munged --foreground --socket="$folder/munge/socket" --key-file="$folder/munge/key" --log-file="$folder/log/munged.log" \
    --pid-file="$folder/run/munged.own.pid" --seed-file="$folder/munge/seed"
  wait_for munged answers
  daemon slurmctld slurmctld -D -f "$SLURM_CONF"
  wait_for slurmctld scontrol ping
  daemon slurmd slurmd -D -f "$SLURM_CONF" -N localhost
  wait_for slurmd is_idle
}

stop() {
  export SLURM_CONF="$folder/etc/slurm.conf"
  [ -f "$SLURM_CONF" ] || die "$folder is no cluster of this script"
  local name pid tries
  # Job steps outlive the daemons, so the jobs go first: asked, and after five seconds killed.
  if scontrol ping > /dev/null 2>&1; then
    scancel --quiet -u root || true
    for ((tries = 0; tries < 50; tries++)); do
      [ -n "$(squeue -h)" ] || break
      sleep 0.1
    done
    if [ -n "$(squeue -h)" ]; then
      scancel --quiet --signal=KILL --full -u root || true
      sleep 1
    fi
  fi
  for name in slurmd slurmctld munged; do
    [ -f "$folder/run/$name.pid" ] || continue
    pid=$(< "$folder/run/$name.pid")
    kill "$pid" 2> /dev/null || true
    for ((tries = 0; tries < 100; tries++)); do
      kill -0 "$pid" 2> /dev/null || break
      sleep 0.05
    done
    kill -KILL "$pid" 2> /dev/null || true
    rm -f "$folder/run/$name.pid"
  done
}

action=${1:-}
case $action in
  check) check ;;
  start | stop)
    (($# >= 2)) || die "usage: bash tests/slurm/cluster.sh $action FOLDER"
    folder=$(mkdir -p "$2" && cd "$2" && pwd)
    shift 2
    "$action" "$@" ;;
  *) die "usage: bash tests/slurm/cluster.sh check | start FOLDER [line ...] | stop FOLDER" ;;
esac
