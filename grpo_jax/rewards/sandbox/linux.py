"""What Linux offers to shut a process in, by its system calls: nothing of it needs a package.

Only the process that starts programs (`server.py`) calls these. Each raises OSError where the
system does not allow it; on other systems than Linux, all of them do.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Iterable

NEW_MOUNTS, NEW_CGROUP, NEW_NAMES, NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEW_USER, NEW_PIDS, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
_READ_ONLY, _NO_SETUID, _NO_DEVICES, _NO_EXEC, _REMOUNT = 1, 2, 4, 8, 32
_BIND, _RECURSIVE, _PRIVATE, _DETACH = 4096, 16384, 1 << 18, 2
_SET_PARENT_SIGNAL, _SET_SECCOMP, _SET_SUBREAPER, _SET_NO_NEW_PRIVS = 1, 22, 36, 38

_IS_ARM = platform.machine() in ("aarch64", "arm64")
_CLONE, _PIVOT_ROOT, _CAPSET = (220, 41, 91) if _IS_ARM else (56, 155, 126)
_MOUNT_SETATTR, _LANDLOCK = 442, 444  # the same number everywhere
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def is_here() -> bool:
    """Whether this is Linux on a processor whose numbers of system calls are known here."""
    machine = platform.machine()
    return sys.platform == "linux" and (_IS_ARM or machine in ("x86_64", "AMD64"))


def _library() -> ctypes.CDLL:
    if not is_here():
        raise OSError(errno.ENOSYS, "not Linux on x86-64 or ARM64")
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _call(what: str, number: int, *arguments: object) -> int:
    long = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(_library().syscall(ctypes.c_long(number), *long), what)


def _prctl(what: str, number: int, *arguments: object) -> int:
    long = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    long += [ctypes.c_ulong(0)] * (4 - len(long))
    return _checked(_library().prctl(number, *long), what)


# --- Namespaces -----------------------------------------------------------------------------------


def unshare(flags: int) -> None:
    """Leaves namespaces of the parent for new ones."""
    _checked(_library().unshare(flags), "unshare")


def map_own_user(user: int, group: int) -> None:
    """In a new user namespace: this user and group keep their numbers, and there are no others."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def fork_into_new_pids() -> int:
    """As `os.fork`, but the child is the first process of a new PID namespace.

    When it ends, the kernel kills all that it started.
    """
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    pid = _library().syscall(ctypes.c_long(_CLONE), ctypes.c_long(NEW_PIDS | 17), 0, 0, 0, 0)
    number = ctypes.get_errno()
    if pid == 0:
        python.PyOS_AfterFork_Child()
        return 0
    python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, f"clone: {os.strerror(number)}")
    return pid


# --- A root of its own ----------------------------------------------------------------------------


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = [None if x is None else os.fsencode(x) for x in (source, target, kind)]
    done = _library().mount(*texts, ctypes.c_ulong(flags), os.fsencode(data) if data else None)
    _checked(done, f"mount {target}")


def _make_read_only(folder: str) -> None:
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY | _NO_SETUID, 0, 0, 0)
    try:  # with all that is mounted below it
        _call("mount_setattr", _MOUNT_SETATTR, -100, ctypes.c_char_p(os.fsencode(folder)), 0x8000,
              ctypes.byref(attributes), ctypes.sizeof(attributes))  # fmt: skip
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        has, kept = os.statvfs(folder).f_flag, 0  # a user namespace must keep these
        for shown, flag in ((4, _NO_DEVICES), (8, _NO_EXEC), (1024, 1024), (2048, 2048)):
            kept |= flag if has & shown else 0
        _mount("none", folder, None, _REMOUNT | _BIND | _READ_ONLY | _NO_SETUID | kept)


def make_root(readable: Iterable[str], over: str = "/sys") -> None:
    """Makes a root in memory that holds the `readable` paths, to read, and null devices.

    It needs a mount namespace of its own. `over`: a folder under which none of the paths lies.
    """
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)
    _mount("root", over, "tmpfs", _NO_SETUID | _NO_DEVICES, "size=4m,nr_inodes=4k,mode=755")
    for path in readable:
        target = over + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            if not os.path.lexists(target):
                os.symlink(os.readlink(path), target)
            continue
        _place(path, target)
        _make_read_only(target)
    for path in DEVICES:
        if os.path.exists(path):
            os.makedirs(over + "/dev", exist_ok=True)
            _place(path, over + path)
    os.mkdir(f"{over}/work")
    if not os.path.exists(f"{over}/tmp"):
        os.symlink("work", f"{over}/tmp")
    os.chdir(over)
    _call("pivot_root", _PIVOT_ROOT, ctypes.c_char_p(b"."), ctypes.c_char_p(b"."))
    _checked(_library().umount2(b".", _DETACH), "umount")
    os.chdir("/")
    _mount("none", "/", None, _REMOUNT | _BIND | _READ_ONLY | _NO_SETUID | _NO_DEVICES)


def _place(path: str, target: str) -> None:
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(path, target, None, _BIND | _RECURSIVE)


def mount_work(folder: str, user: int, group: int, size_bytes: int, files: int) -> None:
    """Mounts an empty folder in memory that holds at most so many bytes and files."""
    data = f"size={size_bytes},nr_inodes={files},mode=700,uid={user},gid={group}"
    _mount("work", folder, "tmpfs", _NO_SETUID | _NO_DEVICES | _NO_EXEC, data)


def unmount(folder: str) -> None:
    """Takes a mounted folder away, with all that is in it."""
    _checked(_library().umount2(os.fsencode(folder), _DETACH), "umount")


# --- Landlock -------------------------------------------------------------------------------------

_TO_READ = 0b1100  # read a file, list a folder
_OF_FILES = 0b1110 | 1 << 14 | 1 << 15


def _landlock_version() -> int:
    return _call("landlock", _LANDLOCK, None, 0, 1)


def landlock(readable: Iterable[str], writable: Iterable[str]) -> int:
    """A ruleset under which only these paths can be read, and only these written to: its file.

    It forbids TCP and signals to other processes too, where the kernel's version can.
    """
    version = _landlock_version()
    files = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    if version in (3, 4):
        files = (1 << 15) - 1
    parts = [files, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0]
    number = 1 + (version >= 4) + (version >= 6)
    handled = (ctypes.c_uint64 * 3)(*parts)
    ruleset = _call("landlock_create_ruleset", _LANDLOCK, ctypes.byref(handled), 8 * number, 0)
    for paths, allowed in ((readable, _TO_READ), (writable, files & ~1), (DEVICES, 0b110)):
        for path in paths:
            try:
                opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:  # there is none
                continue
            rights = allowed & files & (~0 if os.path.isdir(path) else _OF_FILES & ~0b1000)
            rule = rights.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
            _call("landlock_add_rule", _LANDLOCK + 1, ruleset, 1, ctypes.c_char_p(rule), 0)
            os.close(opened)
    return ruleset


def enter_landlock(ruleset: int) -> None:
    """Puts this process and its children under a ruleset; after `no_new_privs`."""
    _call("landlock_restrict_self", _LANDLOCK + 2, ruleset, 0)


# --- Rights ---------------------------------------------------------------------------------------


def no_new_privs() -> None:
    """From now on, no program that this process starts has more rights than it has."""
    _prctl("no_new_privs", _SET_NO_NEW_PRIVS, 1)


def become_subreaper() -> None:
    """Orphans below this process become its children."""
    _prctl("subreaper", _SET_SUBREAPER, 1)


def end_with_parent() -> None:
    """This process is killed when its parent ends; a change of user undoes that."""
    _prctl("parent's end", _SET_PARENT_SIGNAL, 9)


def drop_capabilities() -> None:
    """Gives up all rights of root."""
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _call("capset", _CAPSET, ctypes.byref(header), ctypes.byref(nothing))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def enter_filter(code: bytes) -> None:
    """Puts this process and its children under a filter of system calls; after `no_new_privs`."""
    program = _Program(len(code) // 8, ctypes.c_char_p(code))
    _prctl("seccomp", _SET_SECCOMP, 2, ctypes.byref(program))
