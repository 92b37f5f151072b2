"""``python -m fedfm``."""

from fedfm.cli import main

main()
