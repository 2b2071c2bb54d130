"""The command `python -m diffjax.export`: see `diffjax.published.export`."""

from .published.export import main

if __name__ == "__main__":
    main()
