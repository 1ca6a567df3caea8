# shellcheck shell=bash
# What the batch scripts here share: set-up, signals, run/status.json, and what happens after a preemption. Sourced by them.
#
# The way of a preemption. SLURM asks with SIGTERM (a job of higher priority needs the place, or the node is drained) or, as these
# scripts request, with SIGUSR1 some minutes before the time limit. The stage saves at the end of its step, writes "preempted" into
# run/status.json and ends with code 75 (which torchrun turns into 1: so the file counts, and the code where there is no file). The
# job then puts itself back into the queue and continues there, MAX_REQUEUES times at most. All that time it is one job with one id, so
# jobs that wait for it (afterok) go on waiting. A run that failed is not repeated: jobs that wait for it are cancelled.
set -euo pipefail

MAX_REQUEUES=${MAX_REQUEUES:-10}
REPEAT_SIGNAL=10 # seconds until a stage that has not ended is asked again: it may not have been listening yet
PREEMPTED_EXIT=75

die() {
  echo "error: $*" >&2
  exit 1
}

[ -n "${SLURM_JOB_ID:-}" ] || die "this script runs inside a job: sbatch slurm/stage.sbatch <stage> --config <YAML>"
[[ $MAX_REQUEUES =~ ^[0-9]+$ ]] || die "MAX_REQUEUES must be a number, not $MAX_REQUEUES"

# ---- The run's status -------------------------------------------------------------------------------------------------

run_folder=                # of the stage in hand; empty where it has none
signalled=                 # the last signal that reached this script
signals=0                  # how many did
child=                     # the srun in hand
at_work=                   # whether a run is in hand whose status is not settled
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# set_status STATE REASON: as babylm/run_folder.py writes it, whole or not at all. REASON: JSON text, without its quotes.
set_status() {
  [ -n "$run_folder" ] || return 0
  mkdir -p "$run_folder/run"
  printf '{\n "state": "%s",\n "reason": "%s",\n "time": "%s",\n "job": "%s"\n}\n' "$1" "$2" "$(date +%Y-%m-%dT%H:%M:%S%z)" "$job" \
    > "$run_folder/run/.status.json.$$.tmp"
  mv "$run_folder/run/.status.json.$$.tmp" "$run_folder/run/status.json"
}

# status_field state|reason
status_field() {
  [ -n "$run_folder" ] && [ -f "$run_folder/run/status.json" ] || return 0
  sed -n 's/^ "'"$1"'": "\(.*\)",\{0,1\}$/\1/p' "$run_folder/run/status.json"
}

# fail REASON: for good. Jobs that wait for this one will not start.
fail() {
  at_work=
  set_status failed "$1"
  echo "slurm/job.sh: $1" >&2
  exit 1
}

at_exit() {
  local code=$?
  [ -n "$at_work" ] || return 0
  trap '' TERM USR1 # what is started here must not die of the signal that ended this script
  if is_cancelled; then
    set_status failed "cancelled by scancel while it was at work"
  else
    set_status failed "the batch script ended with code $code; its log says why"
  fi
}
trap at_exit EXIT

# ---- Signals ----------------------------------------------------------------------------------------------------------

# Always SIGUSR1: srun hands it on to every process of the step, while SIGTERM would make srun end the step without waiting.
hand_on() {
  signalled=$1
  ((++signals))
  echo "slurm/job.sh: SIG$1" >&2
  [ -z "$child" ] || kill -USR1 "$child" 2> /dev/null || true
}
trap 'hand_on TERM' TERM
trap 'hand_on USR1' USR1

# wait_for_child: its exit code, however many signals come in the meantime
wait_for_child() {
  local code repeater='' before
  while :; do
    before=$signals
    code=0
    wait "$child" || code=$?
    ((signals > before)) || break # not interrupted: this is the child's own code
    # SLURM kills a cancelled job after KillWait, which may be before its srun has ended: say it while there is time.
    ! is_cancelled || set_status failed "cancelled by scancel while it was at work"
    [ -n "$repeater" ] || { repeat_signal & repeater=$!; }
  done
  [ -z "$repeater" ] || kill "$repeater" 2> /dev/null || true
  return "$code"
}

# requeued_by_slurm: whether SLURM itself is putting this job back into the queue (scontrol requeue, a higher priority).
requeued_by_slurm() {
  local restarts
  restarts=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* Restarts=\([0-9]*\).*/\1/p' || true)
  ((${restarts:-0} > ${SLURM_RESTART_COUNT:-0}))
}

# is_cancelled: whether this job is ending by scancel; the time limit ends it, too, but then it may go on later.
is_cancelled() {
  local shown state cause
  shown=$(scontrol show job --oneliner "$SLURM_JOB_ID" || true)
  state=$(sed -n 's/.* JobState=\([^ ]*\).*/\1/p' <<< "$shown")
  cause=$(sed -n 's/.* JobState=[^ ]* Reason=\([^ ]*\).*/\1/p' <<< "$shown")
  [ -n "$state" ] && [ "$state" != RUNNING ] && [ "$cause" != TimeLimit ] && ! requeued_by_slurm
}

repeat_signal() {
  trap - TERM USR1 EXIT
  while sleep "$REPEAT_SIGNAL"; do
    kill -USR1 "$child" 2> /dev/null || return 0
  done
}

# ---- One stage --------------------------------------------------------------------------------------------------------

# run_resumable FOLDER [srun options] COMMAND...: returns when the command succeeded; else the job ends here.
run_resumable() {
  local code=0 state
  run_folder=$1
  shift
  at_work=yes
  set_status pending "job $job has started on $(hostname)"
  if [ -z "$signalled" ]; then
    echo "slurm/job.sh: job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(hostname), $(date +%Y-%m-%dT%H:%M:%S)"
    # Since SLURM 22.05, srun does not take over --cpus-per-task; and with sbatch --export=NONE it would find no PATH.
    srun --export=ALL ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} "$@" &
    child=$!
    [ -z "$signalled" ] || kill -USR1 "$child" || true # between the last look and now
    wait_for_child || code=$?
    child=
  else
    code=$PREEMPTED_EXIT
  fi
  # Once more where a signal to all of the job's processes, this script's children too, came just then.
  state=$(status_field state) || state=$(status_field state)
  case $state in
    done | failed | preempted) ;;
    # The stage has not said how it ended: it was killed, or it had not begun, or it keeps no status.
    *) if ((code == PREEMPTED_EXIT)) || { ((code != 0)) && [ -n "$signalled" ]; }; then
        state=preempted
        set_status preempted "stopped${signalled:+ by SIG$signalled}, exit code $code; the same command continues"
      elif ((code != 0)); then
        fail "ended with exit code $code$( ((code != 137)) || echo ' (killed: more memory than the job asked for?)'); see the log of job $job"
      else
        set_status "done" "exit code 0"
      fi ;;
  esac
  if [ "$state" = preempted ]; then
    at_work=
    back_into_the_queue
  fi
  if ((code != 0)); then
    at_work= # the stage has said why
    exit "$((code == PREEMPTED_EXIT ? 1 : code))"
  fi
  at_work=
}

# back_into_the_queue: the end of a preempted job. Never exit code 75: where RequeueExit=75 is set, that would go on without a bound.
back_into_the_queue() {
  local count=${SLURM_RESTART_COUNT:-0} reason
  reason=$(status_field reason) || reason=$(status_field reason)
  reason=${reason:-preempted}
  if requeued_by_slurm; then
    echo "slurm/job.sh: SLURM itself has put job $job back into the queue"
    exit 1 # nobody reads it: the job waits again
  fi
  ! is_cancelled || fail "cancelled: $reason"
  if ((count >= MAX_REQUEUES)); then
    fail "given up after $count requeues (MAX_REQUEUES): $reason"
  fi
  set_status preempted "$reason (job $job goes back into the queue: $((count + 1)) of at most $MAX_REQUEUES times)"
  echo "slurm/job.sh: $reason; job $job goes back into the queue, $((count + 1)) of at most $MAX_REQUEUES times"
  # SLURM ends this script at once, so nothing may follow that matters; the sleep keeps it from looking finished before that.
  if scontrol requeue "$SLURM_JOB_ID"; then
    sleep 60 || true
    exit 1
  fi
  fail "preempted, but SLURM would not requeue job $job (its log says why); submit it again to continue: $reason"
}

# run_stage SRUN_OPTIONS... -- STAGE ARGUMENTS...: a stage script, as after `python`
run_stage() {
  local options=() folder
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  folder=$(python -m slurm.runs folder "$@") || exit 1 # it has said why
  run_resumable "$folder" "${options[@]}" "$@"
}

# ---- Set-up -----------------------------------------------------------------------------------------------------------

set +u # what modules and activation scripts read is not always set
# shellcheck source=slurm/environment.sh
source slurm/environment.sh
set -u
command -v python > /dev/null || die "no python on $(hostname): set up modules or .venv in slurm/environment.sh"
