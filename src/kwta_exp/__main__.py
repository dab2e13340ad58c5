"""``python -m kwta_exp COMMAND``."""

from kwta_exp.cli import main

main()
