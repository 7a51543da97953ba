#!/usr/bin/env bash
# Runs a program as N processes on the CPU of this machine, to try at a desk what runs on many hosts:
#   launch/local_multiprocess.sh N python -m grpo_jax.train --config configs/quickstart.py [...]
# When one dies, the others are ended too. Every line is preceded by the number of its process.
set -um # with m each process has a group, which its children belong to
num=${1:-}
if ! [[ $num =~ ^[1-9][0-9]*$ ]] || (($# < 2)); then
  sed -n '2,4s/^# //p' "$0" >&2
  exit 2
fi
shift
port=${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_NUM_PROCESSES=$num
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port PYTHONUNBUFFERED=1

running=() printers=()
for ((i = 0; i < num; i++)); do
  exec {line}> >(trap '' INT TERM; exec sed -u "s/^/[$i] /")
  printers+=($!)
  JAX_PROCESS_ID=$i "$@" >&"$line" 2>&1 {line}>&- &
  running[i]=$!
  exec {line}>&-
done

groups=("${running[@]/#/-}")
exec 3>&2 2>/dev/null # what bash itself says of those that are killed
say() { echo "local_multiprocess: $*" >&3; }
# The first asks the run to save and end, the second ends it.
trap 'kill -TERM "${running[@]}"; trap "kill -KILL -- \${groups[*]}" INT TERM' INT TERM

result=0
ended=() # "process number, status" of those that failed
collect() {
  local i status
  for i in "${!running[@]}"; do
    kill -0 "${running[i]}" 2>/dev/null && continue
    wait "${running[i]}"
    status=$?
    case $status in
      0) ;;
      75) result=75 ;; # it was asked to stop and has saved, as the others do
      *) ended+=("$i $status") ;;
    esac
    unset "running[i]"
  done
}

while ((${#running[@]} && ${#ended[@]} == 0)); do
  sleep 0.1
  collect
done
if ((${#ended[@]})); then
  sleep 0.5 # those that the first took along
  collect
fi
((${#ended[@]} == 0)) || result=0
told_by_signal=() told=()
for entry in ${ended[@]+"${ended[@]}"}; do
  read -r i status <<<"$entry"
  if ((status > 128)); then
    name=SIG$(kill -l "$status")
    text="process $i of $num was ended by $name (status $status)"
    # JAX aborts a process that has lost another: that one is not the first.
    if [[ $name == SIGABRT ]]; then told+=("$text"); else told_by_signal+=("$text"); fi
  else
    told+=("process $i of $num ended with status $status")
  fi
  ((result)) || result=$status
done
for text in ${told_by_signal[@]+"${told_by_signal[@]}"} ${told[@]+"${told[@]}"}; do say "$text"; done
for i in "${!running[@]}"; do
  state=$(ps -o stat= -p "${running[i]}")
  [[ $state == T* ]] && say "process $i of $num is stopped; the others wait for it in vain"
done
if ((${#running[@]})); then
  say "ending the other ${#running[@]}"
  kill -TERM "${running[@]}"
  for ((t = 0; t < 50 && ${#running[@]}; t++)); do
    sleep 0.1
    collect
  done
fi
kill -KILL -- "${groups[@]}"
for ((t = 0; t < 20; t++)); do # until all that was said is printed
  kill -0 "${printers[@]}" 2>/dev/null || break
  sleep 0.1
done
exit "$result"
