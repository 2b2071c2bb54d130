"""How to install an extra: the words of every message about a package that is missing."""


def install(extra: str) -> str:
    """The command that installs an extra of `pyproject.toml`.

    >>> install("plots")
    "pip install '.[plots]' in a checkout of diffjax (README.md says how without one)"
    """
    return f"pip install '.[{extra}]' in a checkout of diffjax (README.md says how without one)"
