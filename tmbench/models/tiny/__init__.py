"""The embedded model: weights and tokenizer."""
