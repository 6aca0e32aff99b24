"""What programs in the sandbox may not ask of the kernel, as a filter that it holds them to (seccomp).

Compilers and programs that read, compute and print need none of these. They reach what the sandbox's limits
do not count (memory of System V or without a name), what belongs to the user (keys), other processes, or
parts of the kernel in which faults are found most often (io_uring, bpf, userfaultfd, mounts).
"""

from __future__ import annotations

import errno
import struct

# From asm/unistd.h: x86-64, arm64. None: there is no such call.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # keys of the user
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # memory and messages of System V
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    # memory that no file system counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # file systems and namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "fanotify_init": (300, 262),
    # parts of the kernel that few programs need
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "lookup_dcookie": (212, 18),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    # the machine
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "acct": (163, 89),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
}
# Refused for some arguments. Memory that is shared and nameless stays when no process has it mapped, and none
# shows it. Sockets other than the internet's reach the machine's host (vsock) or parts of the kernel that few
# programs need. A pair of them is let be: Java's files need one.
_MMAP, _SHARED_AND_NAMELESS = (9, 222), 0x21
_SOCKET, _INTERNET = (41, 198), (2, 10)
# As an older kernel answers, so that a library does it in another way.
_AS_IF_MISSING = frozenset({"memfd_create", "memfd_secret", "io_uring_setup", "userfaultfd"})

_MACHINES = {
    "x86_64": (0, 0xC000003E),
    "aarch64": (1, 0xC00000B7),
}  # column above, AUDIT_ARCH of linux/audit.h
# From linux/bpf_common.h and linux/seccomp.h.
_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_NUMBER, _ARCH, _FIRST, _FOURTH = 0, 4, 16, 40  # places in seccomp_data; of arguments, the lower half
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_X32 = 0x40000000  # calls of another interface, on x86-64


def keyctl(machine: str) -> int:
    """The number of the call that joins a new, empty keyring."""
    number = _REFUSED["keyctl"][_MACHINES[machine][0]]
    assert number is not None
    return number


def known(machine: str) -> bool:
    """Whether there is a filter for a machine, as `platform.machine` names it."""
    return machine in _MACHINES


def refused(machine: str) -> dict[str, int]:
    """Numbers of the calls that are refused, by name."""
    column = _MACHINES[machine][0]
    return {name: number for name, both in _REFUSED.items() if (number := both[column]) is not None}


def program(machine: str) -> bytes:
    """The filter: instructions of 8 bytes (struct sock_filter)."""
    lines = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _MACHINES[machine][1]),
        (_RETURN, 0, 0, _KILL),  # another kind of program could make calls under other numbers
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for name, number in refused(machine).items():
        code = errno.ENOSYS if name in _AS_IF_MISSING else errno.EPERM
        lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERROR | code)]
    column = _MACHINES[machine][0]
    lines += [
        (_EQUAL, 0, 5, _MMAP[column]),
        (_LOAD, 0, 0, _FOURTH),
        (_AND, 0, 0, _SHARED_AND_NAMELESS),
        (_EQUAL, 0, 1, _SHARED_AND_NAMELESS),
        (_RETURN, 0, 0, _ERROR | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
        (_EQUAL, 0, 4, _SOCKET[column]),
        (_LOAD, 0, 0, _FIRST),
        (_EQUAL, 2, 0, _INTERNET[0]),
        (_EQUAL, 1, 0, _INTERNET[1]),
        (_RETURN, 0, 0, _ERROR | errno.EAFNOSUPPORT),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
