#!/bin/bash
# Stand-in for the official script of this name: the same command line, fewer tasks. Like it, it goes on after a task that fails,
# and ends with the exit code of the last; that one is about data that may not be there.
DATA=${4:-evaluation_data/fast_eval}
python -m standin "$1" "$3" "$DATA/supplement_fast" "$DATA/wug_past_tense" "$DATA/reading" --revision_name "$2"
ls "$DATA/ewok_fast"
