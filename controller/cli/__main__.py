"""`python -m controller.cli`: the same as `bellwether`."""

from controller.cli import main

main()
