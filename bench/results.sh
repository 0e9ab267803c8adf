#!/usr/bin/env bash
# Measure what docs/results.md says and write it, from the tree's root, with logs in the folder given.
# Half an hour on two cores. Stopped, it goes on where it was.
#
#     bench/results.sh FOLDER
set -euo pipefail
logs=$1
mkdir -p "$logs"
export PATH=$PWD/.venv/bin:$PATH

policies=csp,snapkv,h2o,streaming,lookm,pyramid,adakv,random
settings=csp:distance=0,csp:distance=16,csp:distance=64,csp:cross_ratio=0,csp:cross_ratio=0.1
settings+=,csp:cross_ratio=0.5,csp:cross_ratio=0.9,csp:cross_ratio=1,csp:n_score=0,csp:sink=1
settings+=,csp:sink=mass,csp:window=4,csp:window=16,csp:window=32,csp:lookahead=0,csp:lookahead=4
settings+=,csp:lookahead=64,csp:distance=0,lookahead=0

suite() { csp-edge eval --threads 1 --samples 5 "$@" > /dev/null; }

for seed in 0 1; do
    suite --seed $seed --policies $policies,$settings --log "$logs/$seed.jsonl" &
done
wait
suite --vendor fluent --policies csp,random --budgets 10%,20% --log "$logs/fluent.jsonl"
csp-edge eval fidelity -m "$(python -c 'import sys; sys.path.append("bench"); import overhead; print(overhead.smollm2())')" \
    --threads 1 --tokens 1024 --windows 6 --log "$logs/fidelity.jsonl" > /dev/null
csp-edge eval report "$logs"/{0,1,fluent,fidelity}.jsonl -o docs/results.md --plot docs/results.png

# the README's table: 8 and 16 pictures
for seed in 0 1 2 3; do
    suite --seed $seed --images 8,16 --budgets 10%,20% \
        --policies "csp,csp:lookahead=0,csp:distance=0,lookahead=0,adakv,snapkv,lookm,random" --log "$logs/many$seed.jsonl" &
    ((seed % 2)) && wait
done
csp-edge eval report "$logs"/many{0,1,2,3}.jsonl |
    grep -A 12 -e '^### Accuracy, .*question' -e '^### Share'
