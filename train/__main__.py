"""`python -m routing_jax.train PRESET --workdir DIR`: the train command by itself."""

import sys

from routing_jax.train.command import guarded, train_command

if __name__ == "__main__":
    sys.exit(guarded(train_command, sys.argv[1:]))
