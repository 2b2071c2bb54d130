"""The command `python -m diffjax.launch`: see `diffjax.training.launch`."""

import sys

from .training.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
