"""``python -m tmbench``, which ``torchrun -m tmbench`` starts on every rank."""

from tmbench.cli import main

main()
