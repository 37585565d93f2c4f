"""tmbench: what an attention method costs and what it keeps when a language model reads a long prompt."""
