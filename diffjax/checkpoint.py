"""Trained networks: `checkpoint.load`; see `diffjax.published.trained`."""

from .published.trained import home, load, read_config

__all__ = ["home", "load", "read_config"]
