"""`python -m routing_jax`: the command line without an installed script."""

import sys

from routing_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
