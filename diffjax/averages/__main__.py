"""The command `python -m diffjax.averages`: see `diffjax.evaluation.widths`."""

import sys

from ..evaluation.widths import main

if __name__ == "__main__":
    main(sys.argv[1:])
