#!/usr/bin/env bash
# The measurements of docs/results.md for one model; run again after an interruption, it goes on.
#   scripts/results_eval.sh MODEL OUT NOVEL.txt      MODEL: a run or model folder; OUT: a folder for the results
set -euo pipefail
if [ $# -ne 3 ]; then
  sed -n 2,3p "$0"
  exit 2
fi
model=$1 out=$2 novel=$3 code=data/results/stdlib/heldout
run() { # FOLDER TASKS SETTINGS...
  local folder=$1 tasks=$2
  shift 2
  fusiontree eval "$model" --tasks "$tasks" --out "$out/$folder" "$@"
}
run wikipedia perplexity --data data/results/wikipedia/test.jsonl --lengths 256,1K,4K --limit 3
run code perplexity --data "$code/**/*.py" --lengths 256,1K,4K --limit 3
run recall copy,phonebook --option sizes=5,10,20 --limit 30
run needles needle_code --lengths 256,1K --depths 0,50,100 --option repeats=3 --option new_tokens=8 --option buffer=60
run words recall --option pairs=4,8,16 --limit 30
run novel perplexity --data "$novel" --lengths 1K,16K --limit 1
run completion codebase --data "$code" --lengths 512 --limit 30
run ruler ruler:niah_single_1,ruler:vt,ruler:fwe --lengths 1K --limit 8
