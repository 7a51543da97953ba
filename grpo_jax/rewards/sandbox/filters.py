"""The filter of system calls under which a program runs: a list of those that it must not make.

A program of a task computes, reads and prints. What it does not need and what harms, or has opened
kernels before, is refused with "not permitted". A filter is a program of classic BPF (seccomp(2)).
"""

from __future__ import annotations

import errno
import platform
import struct

# By name: the number on x86-64 and on ARM64; None where there is none.
_OTHERS = {  # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "execve": (59, 221),
    "execveat": (322, 281),
}
_NETWORK = {"socket": (41, 198), "bind": (49, 200), "connect": (42, 203)}
_MEMORY = {  # that no limit counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
_SYSTEM = {
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "personality": (135, 92),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "lookup_dcookie": (212, 18),
    "syslog": (103, 116),
    "vhangup": (153, 58),
}
_OWNERS = {  # change files that are only reached by name, which Landlock does not see
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}
_FORKS = {"fork": (57, None), "vfork": (58, None)}
_SIGNALS, _LIMITS = ((62, 129), (200, 130), (234, 131)), (302, 261)  # kill, ...; prlimit64
_CLONE, _CLONE3 = (56, 220), (435, 435)
_NEW_NAMESPACES, _THREAD = 0x7E020080, 0x00010000

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _FIRST = 0, 4, 16  # offsets in what a filter reads


def _line(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)


def program(*, own_pid: int | None, may_fork: bool = True) -> bytes:
    """The filter's code, to be entered by the process that runs the program.

    `own_pid`: None for a process that sees no other ones but its children, and no files but its
    own. Else its number: it then starts no processes and signals none but itself, and does not
    change owners, rights or dates of files. `may_fork` False: it starts none in any case.
    """
    may_fork = may_fork and own_pid is None
    arm = platform.machine() in ("aarch64", "arm64")
    refused = _OTHERS | _NETWORK | _MEMORY | _SYSTEM
    if own_pid is not None:
        refused = refused | _OWNERS
    if not may_fork:
        refused = refused | _FORKS
    numbers = [pair[arm] for pair in refused.values() if pair[arm] is not None]
    refuse = _line(_RETURN, _ERROR | errno.EPERM)
    lines = [
        _line(_LOAD, _ARCHITECTURE),
        _line(_EQUAL, 0xC00000B7 if arm else 0xC000003E, 1, 0),
        _line(_RETURN, _KILL),
        _line(_LOAD, _NUMBER),
    ]
    if not arm:  # the x32 calls have the same architecture
        lines += [_line(_AT_LEAST, 0x40000000, 0, 1), _line(_RETURN, _KILL)]
    for number in numbers:
        lines += [_line(_EQUAL, number, 0, 1), refuse]
    # Flags of clone3 stand in memory, which no filter reads: libraries then use clone.
    lines += [_line(_EQUAL, _CLONE3[arm], 0, 1), _line(_RETURN, _ERROR | errno.ENOSYS)]
    if own_pid is not None:
        for pair, only in (*((pair, own_pid) for pair in _SIGNALS), (_LIMITS, 0)):
            lines += [
                _line(_EQUAL, pair[arm], 0, 4),
                _line(_LOAD, _FIRST),
                _line(_EQUAL, only, 1, 0),
                refuse,
                _line(_RETURN, _ALLOW),
            ]
    lines += [_line(_EQUAL, _CLONE[arm], 1, 0), _line(_RETURN, _ALLOW), _line(_LOAD, _FIRST)]
    lines += [_line(_ANY_BIT, _NEW_NAMESPACES, 0, 1), refuse]
    if not may_fork:
        lines += [_line(_ANY_BIT, _THREAD, 1, 0), refuse]
    return b"".join([*lines, _line(_RETURN, _ALLOW)])
