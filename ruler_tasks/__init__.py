"""RULER's thirteen tasks: prompts of an exact length, and their scores."""
