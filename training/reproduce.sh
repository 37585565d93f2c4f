#!/bin/sh
# Makes tmbench/models/tiny from nothing: the tokenizer, the weights, the table of accuracies. One GPU, about ten minutes.
# Run from the repository's root in an environment with `pip install -e .`.
set -e
export HF_HUB_OFFLINE=1 # the generated prose and documents stand in for the public data sets
python training/tokenizer.py
python training/train.py
python training/evaluate.py
