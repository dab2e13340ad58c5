"""Train, attack and report: ``python run.py`` for the demo, ``python run.py --help`` for the rest."""

from kwta_exp.command import main

if __name__ == "__main__":
    main()
