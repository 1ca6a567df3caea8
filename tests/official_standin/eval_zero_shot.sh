#!/bin/bash
# Stand-in for the official script of this name: the same command line, fewer tasks.
DATA=${3:-evaluation_data/full_eval}
python -m standin "$1" "$2" "$DATA/supplement_filtered" "$DATA/wug_past_tense" "$DATA/reading"
