"""Errors of the system that reading the same file again may not meet."""

import errno

NUMBERS = frozenset(
    {
        *(errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOMEM, errno.EMFILE),
        *(errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    }
)
"""Those that a disk, a network file system or a busy machine gives, whatever the input is."""


def is_transient(error: BaseException) -> bool:
    """Whether the system is at fault, so that the same command may succeed when it runs again.

    >>> is_transient(OSError(errno.ESTALE, "Stale file handle"))
    True
    >>> is_transient(FileNotFoundError(errno.ENOENT, "No such file or directory"))
    False
    """
    return isinstance(error, OSError) and error.errno in NUMBERS
