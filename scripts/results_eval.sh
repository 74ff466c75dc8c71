#!/usr/bin/env bash
# The measurements of docs/results.md for one model; run again after an interruption, it goes on.
#   scripts/results_eval.sh MODEL OUT NOVEL.txt      MODEL: a run or model folder; OUT: a folder for the results
# FULL=1 measures longer contexts and asks more, as a machine with time can.
set -euo pipefail
if [ $# -ne 3 ]; then
  sed -n 2,4p "$0"
  exit 2
fi
model=$1 out=$2 novel=$3
code=data/results/stdlib/heldout
lengths=256,1K,4K windows=2 questions=24
if [ "${FULL:-0}" = 1 ]; then
  lengths=256,1K,4K,16K,64K windows=2 questions=90
fi
run() { # FOLDER TASKS SETTINGS...
  local folder=$1 tasks=$2
  shift 2
  fusiontree eval "$model" --tasks "$tasks" --out "$out/$folder" "$@"
}
run wikipedia perplexity --data data/results/wikipedia/test.jsonl --lengths "${lengths%,16K,64K}" --limit "$windows"
run code perplexity --data "$code/**/*.py" --lengths "${lengths%,16K,64K}" --limit "$windows"
run needles needle_code --lengths 256,1K --depths 0,50,100 --option repeats=4 --option new_tokens=8 --option buffer=60
run recall copy,phonebook --option sizes=5,10,20 --limit "$questions"
run completion codebase --data "$code" --lengths 512 --limit "$questions"
if [ "${FULL:-0}" = 1 ]; then
  run novel perplexity --data "$novel" --lengths "$lengths" --limit "$windows"
  run ruler ruler:niah_single_1,ruler:vt,ruler:fwe --lengths 1K --limit "$questions"
fi
