"""Attention on tensors: one module per pattern, each with its definition and its backends."""
