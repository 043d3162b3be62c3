"""`python -m mmrl.cli`, as launchers start it."""

from mmrl.cli import main

main()
