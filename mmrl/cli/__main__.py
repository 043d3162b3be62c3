"""`python -m mmrl.cli`, for torchrun and other launchers."""

from mmrl.cli import main

main()
