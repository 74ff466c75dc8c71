#!/usr/bin/env bash
# Where the time goes: scripts/run_profile.sh MODEL [--tokens 32] [--prompt-tokens 512] [--device cpu] [--out FOLDER]
#
# Runs torch's profiler over the reading of a prompt and over decoding, prints the operators that cost most, and writes
# a trace of each for chrome://tracing or https://ui.perfetto.dev.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
    echo "usage: scripts/run_profile.sh MODEL [--tokens N] [--prompt-tokens N] [--device cpu|cuda] [--out FOLDER]" >&2
    exit 2
fi
exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/profile_model.py" "$@"
