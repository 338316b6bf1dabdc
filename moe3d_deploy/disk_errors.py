"""What an OSError says of the place that was written to: whether it is full, failing or closed, and what to do."""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: a limit on the size of files
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def remedy(error: OSError) -> str | None:
    """What to do about a disk that took no more; None for any other error, such as a missing right."""
    if error.errno in FULL:
        return "make room or choose another place"
    if error.errno == errno.ENOENT and "temporary directory" in str(error.strerror):  # tempfile's, after it tried all
        return "make room in one, or choose another place with TMPDIR"
    if error.errno == errno.EIO:
        return "check the disk (see `dmesg`) or choose another place"
    return None


def name_place(error: OSError, path: object) -> None:
    """Let an error that says that the disk is full name `path`: a failed write does not say of which file it is."""
    if error.errno in FULL and error.filename is None:
        error.filename = str(path)


def is_not_allowed(error: OSError) -> bool:
    """Whether a right is missing or the file system is mounted read-only: the place that was given is the wrong one."""
    return error.errno in _NOT_ALLOWED
