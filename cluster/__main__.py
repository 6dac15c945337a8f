"""`python -m cluster`: see cli.py."""

from cluster.cli import main
from contracts.startup import collect_seldom

if __name__ == "__main__":
    collect_seldom()
    main()
