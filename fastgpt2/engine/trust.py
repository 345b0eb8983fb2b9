"""Whom the cache is trusted to: its folder and its files count only if nobody else could have written them.

Whoever could write a packed file could give every model's text another turn. So, as ssh does with keys, owner and mode
are looked at. A file or a folder may belong to this process's user or to root, and nobody else may have the right to
write there: not everybody, nor a group with other members, nor whoever an access list names. The folders above must
keep others from putting another folder in its place; a sticky one does, as /tmp is. They are looked at up to the root
of the volume. That root has whatever mode its maker gave it: Kubernetes makes many that everybody may write, and a
folder that somebody else puts there belongs to somebody else.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from pathlib import Path

from fastgpt2.errors import ModelError

_OTHERS, _GROUP = stat.S_IWOTH, stat.S_IWGRP
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

# Nobody else may write, even with `umask 0`.
_FOLDER_MODE, _FILE_MODE = 0o755, 0o644

# Linux's name of an access list, which may give rights to others than the group of a file.
_ACCESS_LIST = "system.posix_acl_access"


class NotTrusted(ModelError):
    """Raised if somebody else could have written a file or a folder of the cache."""


def check_folder(folder: Path) -> None:
    """Raise NotTrusted if somebody else may write into a folder of the cache, or put another in its place.

    A folder that does not exist is trusted if it can be made in one that is.
    """
    own = (0, os.geteuid())
    folder = folder.resolve()
    if folder.exists():
        _check(folder, folder.stat(), own)
    is_volume = folder.is_mount()
    # Whoever owns the root folder owns the machine; in a user namespace that is not always root.
    root = Path("/")
    owners = (*own, root.stat().st_uid)
    for place in folder.parents:
        if is_volume:
            return
        is_volume = place.is_mount()
        if place.exists() and (place == root or not is_volume):
            status = place.stat()
            if not status.st_mode & stat.S_ISVTX or status.st_uid not in owners:
                _check(place, status, owners)


def make_folder(folder: Path) -> None:
    """Make a folder of the cache, and those above that are missing, so that nobody else may write there."""
    for place in (*reversed(folder.parents), folder):
        if not place.is_dir():
            place.mkdir(_FOLDER_MODE, exist_ok=True)


def create_file(path: Path, mode: int = _FILE_MODE) -> int:
    """Return the descriptor of a new file of the cache, for writing, in place of one that may have the name.

    Raises:
        OSError: it cannot be made.
    """
    path.unlink(missing_ok=True)
    return os.open(path, _CREATE, mode)


def open_trusted(path: Path) -> int:
    """Return the descriptor of a file of the cache, for reading.

    Raises:
        NotTrusted: somebody else could have written it, or it is no file.
        OSError: it cannot be opened.
    """
    _check_is_file(path, os.lstat(path))  # To open a device could do something by itself.
    fd = os.open(path, _OPEN)
    try:
        status = os.fstat(fd)
        _check_is_file(path, status)
        _check(path, status, (0, os.geteuid()))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_is_file(path: Path, status: os.stat_result) -> None:
    """Raise NotTrusted for a folder, a link, a pipe or a device."""
    if not stat.S_ISREG(status.st_mode):
        raise NotTrusted(f"{path}: not trusted, since it is no file: rm -r {_quoted(path)}")


def _check(path: Path, status: os.stat_result, owners: tuple[int, ...]) -> None:
    """Raise NotTrusted, with the command that mends it, if somebody else owns something or may write it."""
    mode = stat.S_IMODE(status.st_mode)
    elsewhere = ", or set FASTGPT2_CACHE to a folder of your own"
    if status.st_uid not in owners:
        raise NotTrusted(
            f"{path}: not trusted, since it belongs to the user {_user_name(status.st_uid)}, and this process is the "
            f"user {_user_name(os.geteuid())}: chown {os.geteuid()} {_quoted(path)}{elsewhere}"
        )
    if mode & _OTHERS:
        raise NotTrusted(
            f"{path}: not trusted, since everybody may write it (mode {mode:04o}): "
            f"chmod go-w {_quoted(path)}{elsewhere}"
        )
    if mode & _GROUP and _has_access_list(path):
        raise NotTrusted(
            f"{path}: not trusted, since its access list may let others write it (mode {mode:04o}): "
            f"chmod g-w {_quoted(path)}{elsewhere}"
        )
    if mode & _GROUP and (member := _other_member(status.st_gid)):
        raise NotTrusted(
            f"{path}: not trusted, since the group {status.st_gid} may write it (mode {mode:04o}), and the user "
            f"{member} is in that: chmod g-w {_quoted(path)}{elsewhere}"
        )


def _other_member(group: int) -> str:
    """Return a member of a group who is neither this process's user nor root; "" if there is none.

    Most systems give each user a group of its own. In containers, a volume often belongs to a group that only the
    container's one user has.
    """
    import grp
    import pwd

    own = {0, os.geteuid()}
    members = [user for user in pwd.getpwall() if user.pw_gid == group]
    # Names are looked up one by one: a directory of a network often lists no users, but knows each.
    with contextlib.suppress(KeyError):
        for name in grp.getgrgid(group).gr_mem:
            with contextlib.suppress(KeyError):
                members.append(pwd.getpwnam(name))
    return next((user.pw_name for user in members if user.pw_uid not in own), "")


def _has_access_list(path: Path) -> bool:
    """Tell whether a file has an access list, whose rights the mode shows as those of the group."""
    try:
        return sys.platform == "linux" and _ACCESS_LIST in os.listxattr(path)
    except OSError:  # the file system has none
        return False


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))


def _user_name(user: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)
