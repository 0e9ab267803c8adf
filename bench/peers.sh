#!/usr/bin/env bash
# Measure csp-edge beside its peers and write docs/benchmarks.md, from the tree's root, with logs in the
# folder given. Some 20 minutes on two cores, and several more the first time, when the
# peers are installed, into build/peers: see bench/peers/README.md.
#
#     bench/peers.sh FOLDER [--rounds 3] [--threads 2]
set -euo pipefail
here=bench/peers python=.venv/bin/python

for peer in llama transformers; do
    venv=build/peers/$peer
    if ! cmp --silent $here/$peer.txt $venv/installed.txt; then
        $python -m venv --clear $venv
        # as its users build it, and not as a build of ours with its libraries left out
        env -u CMAKE_ARGS $venv/bin/pip install --quiet --no-cache-dir -r $here/$peer.txt
        cp $here/$peer.txt $venv/installed.txt
    fi
done
$python $here/run.py "$@"
$python $here/page.py "$1/log.jsonl" docs/benchmarks.md
