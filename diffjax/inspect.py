"""The command `python -m diffjax.inspect`: see `diffjax.experiment.inspect`."""

from .experiment.inspect import main

if __name__ == "__main__":
    main()
