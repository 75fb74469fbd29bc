#!/usr/bin/env bash
# Runs on every worker of a TPU, where launch_tpu.py has copied it. Training is detached from the connection that starts
# it, so that it outlives a lost one.
#   bash tpu_worker.sh setup COMMAND          unpack jaxlm.tar.gz and run a command in it, unless it is the one that was
#   bash tpu_worker.sh start COMMAND [ARG...] run a command in it, in the background, unless one is at work
#   bash tpu_worker.sh follow                 print what it has printed and prints, until it ends
#   bash tpu_worker.sh wait                   wait for its end; exit with its status, with its last lines if that is not 0
#   bash tpu_worker.sh stop RUN_DIR           end it after its next update, with a checkpoint and status 0
set -euo pipefail
cd "$HOME"

# A number from before a restart of the machine may be that of another process.
at_work() { grep --quiet tpu_worker.sh "/proc/$(cat train.pid)/cmdline"; } 2>/dev/null

case ${1-} in
setup)
    if at_work || cmp --silent jaxlm.tar.gz installed.tar.gz; then exit 0; fi
    mkdir -p jaxlm
    tar --extract --gzip --file jaxlm.tar.gz --directory jaxlm
    (cd jaxlm && bash -c "$2")
    cp jaxlm.tar.gz installed.tar.gz
    ;;
start)
    if at_work; then
        echo "training is at work already" >&2
        exit 0
    fi
    rm -f train.pid train.status
    # A session of its own, and nothing open that would keep the connection.
    setsid --fork bash tpu_worker.sh keep "${@:2}" </dev/null >train.log 2>&1
    until [[ -s train.pid ]]; do sleep 0.05; done
    ;;
keep) # in the background, by start
    cd jaxlm
    trap : TERM # when the machine shuts down, every process gets it; a second one would end training without a checkpoint
    "${@:2}" &
    echo $$ >"$HOME/train.pid"
    while kill -0 $! 2>/dev/null; do wait $! || true; done
    status=0
    wait $! || status=$?
    echo "$status" >"$HOME/train.status"
    ;;
follow)
    if [[ ! -s train.pid ]]; then
        echo "$HOSTNAME: nothing has been started here" >&2
        exit 1
    fi
    (while at_work; do sleep 0.2; done) &
    tail --lines=+1 --follow --sleep-interval=0.2 --pid=$! train.log
    ;;
wait)
    while at_work; do sleep 0.2; done
    status=$(cat train.status 2>/dev/null) || status="" # killed, or never started
    if [[ $status != 0 ]]; then
        echo "$HOSTNAME: training ended with status ${status:-unknown}; its last lines:" >&2
        tail --lines=20 train.log >&2 || true
    fi
    exit "${status:-1}"
    ;;
stop)
    (cd jaxlm && touch "$2/stop")
    ;;
*)
    echo "usage: bash tpu_worker.sh setup|start|follow|wait|stop" >&2
    exit 2
    ;;
esac
