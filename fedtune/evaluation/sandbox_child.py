"""The inner half of `fedtune.evaluation.sandbox`: confines itself, then runs untrusted commands.

Started as a program of its own (`python -I -S sandbox_child.py`), reads one JSON job from stdin and writes
one JSON report to stdout. With `isolation: namespaces` it is three processes: the one that was started, one
that enters new namespaces (and so needs a parent outside to write its user map), and the first process of the
new process namespace, which builds the file system, runs the commands and watches them. When that one ends,
the kernel kills whatever is left in its namespace and drops its file systems.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

# From linux/sched.h, sys/mount.h, linux/mount.h, sys/prctl.h.
NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
#                mount        uts          ipc          user         pid          net
MS_BIND, MS_REC, MS_SLAVE, MS_NOSUID, MS_NODEV = 0x1000, 0x4000, 0x80000, 0x2, 0x4
MNT_DETACH = 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID = 0x1, 0x2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 1, 38, 36
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, KEYCTL_JOIN_SESSION_KEYRING = 22, 2, 1

INSIDE = 1000  # the user and group of the commands, as they see themselves
WORK = "/sandbox"  # the only folder that they can write to
FOLDERS = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")  # of compilers and their libraries
DEVICES = ("null", "full", "random", "urandom")  # zero, mapped by several, is memory that no process shows
SETTINGS = ("alternatives", "ld.so.cache")  # of /etc; java-* besides
TICK_S = 0.02  # between two looks at what the commands use; five times that without a namespace, where
#                each look goes over all processes of the machine

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The system does not permit the isolation that was asked for."""


def main() -> None:
    """Reads a job, runs it, writes the report."""
    job = json.load(sys.stdin)
    report = os.dup(1)  # not inherited by the commands
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a handler, process 1 gets no signal from inside
    try:
        _die_with(job["parent"])
        if job["isolation"] == "none":
            _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans come to us, and so can be found and killed
            answer: Any = {"steps": _run_steps(job, job["root"])}
        else:
            _in_namespaces(job, report)
            return
    except (Refused, OSError) as error:
        answer = {"refused": str(error)}
    _write(report, answer)


def _write(report: int, answer: Any) -> None:
    with os.fdopen(report, "w") as file:
        json.dump(answer, file)


def _in_namespaces(job: dict[str, Any], report: int) -> None:
    """Forks twice: into new namespaces, and to be process 1 there. Returns when all have ended."""
    outside_id = _unused_id() if os.geteuid() == 0 else None
    ready_read, ready_write = os.pipe()
    mapped_read, mapped_write = os.pipe()
    above = os.getpid()
    entering = os.fork()
    if entering == 0:
        try:
            _die_with(above)
            _call("unshare", libc.unshare(NEW_NAMESPACES))
            _die_with(above)  # new credentials may have cleared it
            os.write(ready_write, b"1")
            os.close(mapped_write)
            if os.read(mapped_read, 1) != b"1":
                raise Refused("the user map of a new user namespace could not be written")
            if first := os.fork():
                os.waitpid(first, 0)
                os._exit(0)
            _die_with(0)  # what it sees as its parent is outside of its namespace
            _build_root(job)
            answer: Any = {"steps": _run_steps(job, WORK, drop_to=INSIDE if outside_id else None)}
        except (Refused, OSError) as error:
            answer = {"refused": str(error)}
        _write(report, answer)
        os._exit(0)
    os.close(ready_write)
    os.close(mapped_read)
    if os.read(ready_read, 1) == b"1":
        try:
            _map_ids(entering, outside_id)
            os.write(mapped_write, b"1")
        except OSError as error:
            os.kill(entering, signal.SIGKILL)
            os.waitpid(entering, 0)
            raise Refused(f"the user map of a new user namespace could not be written: {error}") from error
    os.close(mapped_write)
    os.waitpid(entering, 0)


def _unused_id() -> int:
    """A user id for the commands of root: no one's, so that a limit on its processes counts only them."""
    return 2_000_000_000 + os.getpid()


def _map_ids(pid: int, outside_id: int | None) -> None:
    if outside_id is None:
        _put(f"/proc/{pid}/setgroups", "deny")  # the kernel's condition for a map by an ordinary user
        _put(f"/proc/{pid}/uid_map", f"{INSIDE} {os.geteuid()} 1")
        _put(f"/proc/{pid}/gid_map", f"{INSIDE} {os.getegid()} 1")
    else:
        for kind in ("uid_map", "gid_map"):
            _put(f"/proc/{pid}/{kind}", f"0 0 1\n{INSIDE} {outside_id} 1")


def _build_root(job: dict[str, Any]) -> None:
    """Makes a file system that holds compilers and interpreters, read-only, and one empty folder."""
    root = job["root"]
    _put("/proc/sys/user/max_user_namespaces", "0")  # the commands get no namespaces, hence no capabilities
    _mount(None, "/", None, MS_REC | MS_SLAVE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for name in FOLDERS:
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{root}/{name}")
        elif os.path.isdir(f"/{name}"):
            _bind(f"/{name}", root)
    java = [f"/etc/{name}" for name in os.listdir("/etc") if name.startswith("java-")]
    devices = [f"/dev/{name}" for name in DEVICES]
    for path in [*(f"/etc/{name}" for name in SETTINGS), *java, *devices, *job["readable"]]:
        if os.path.exists(path) and path not in ("/", "/usr") and not path.startswith("/usr/"):
            _bind(path, root)
    for name in ("proc", WORK.strip("/")):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    _mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV)
    if not os.path.exists(f"{root}/tmp"):
        os.symlink(WORK, f"{root}/tmp")
    _make_read_only(root)
    size = f"mode=700,uid={INSIDE},gid={INSIDE},size={job['disk_bytes']},nr_inodes={job['disk_files']}"
    _mount("tmpfs", f"{root}{WORK}", "tmpfs", MS_NOSUID | MS_NODEV, size)
    os.chdir(root)
    _call("pivot_root", libc.pivot_root(b".", b"."))
    _call("umount", libc.umount2(b".", MNT_DETACH))  # the old root lies over the new one


def _bind(path: str, root: str) -> None:
    target = root + path
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(path, target, None, MS_BIND | MS_REC)


def _make_read_only(path: str) -> None:
    attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY | ATTR_NOSUID, 0, 0, 0)  # set, clear, propagation, userns
    done = libc.syscall(
        ctypes.c_long(SYS_MOUNT_SETATTR),
        ctypes.c_int(AT_FDCWD),
        ctypes.c_char_p(path.encode()),
        ctypes.c_uint(AT_RECURSIVE),
        attributes,
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )
    _call("mount_setattr", done)


def _run_steps(job: dict[str, Any], work: str, drop_to: int | None = None) -> list[dict[str, Any]]:
    """Runs the commands in turn until one fails. `work` is theirs; everything else here is ours."""
    os.chdir(work)
    for name, text in job["files"].items():
        if os.path.dirname(name):
            os.makedirs(os.path.dirname(name), exist_ok=True)
        _put(name, text)
    if drop_to is not None:
        for folder, folders, files in os.walk("."):
            for name in [*folders, *files]:
                os.chown(os.path.join(folder, name), drop_to, drop_to)
    steps: list[dict[str, Any]] = []
    for step in job["steps"]:
        steps.append(_watch(step, job, _start(step, job, work, drop_to)))
        if steps[-1]["status"] != 0 or steps[-1]["stopped"]:
            break
    return steps


def _start(step: dict[str, Any], job: dict[str, Any], work: str, drop_to: int | None) -> tuple[int, int, int]:
    """Forks and executes a command; returns its process id, and where its output and its seal are read."""
    output_read, output_write = os.pipe()
    error_read, error_write = os.pipe()  # closed by a successful exec
    nonce_read, nonce_write = os.pipe()
    seal_read, seal_write = os.pipe()
    os.write(nonce_write, step["nonce"].encode())
    os.close(nonce_write)
    if drop_to is not None:
        os.fchown(seal_write, drop_to, drop_to)  # Java can only open it by name
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            for place, ours in enumerate((nonce_read, output_write, output_write, seal_write)):
                os.dup2(ours, place)  # 3 was our report's
            _confine(step, job, drop_to)
            environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "TMPDIR": work}
            os.execvpe(step["command"][0], step["command"], environment | step["environment"])
        except BaseException as error:
            os.write(error_write, f"cannot start {step['command'][0]}: {error}".encode())
        finally:
            os._exit(127)
    for theirs in (output_write, error_write, nonce_read, seal_write):
        os.close(theirs)
    with os.fdopen(error_read) as errors:
        if why := errors.read():
            os.waitpid(pid, 0)
            raise Refused(why)
    return pid, output_read, seal_read


def _confine(step: dict[str, Any], job: dict[str, Any], drop_to: int | None) -> None:
    os.nice(5)  # the watcher goes before what it watches
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)  # Python ignores them, and exec would pass that on
    for kind, soft, hard in step["limits"]:
        allowed = resource.getrlimit(kind)[1]
        top = hard if allowed == resource.RLIM_INFINITY else min(hard, allowed)
        resource.setrlimit(kind, (min(soft, top), top))
    if drop_to is not None:
        os.setgroups([])
        os.setresgid(drop_to, drop_to, drop_to)
        os.setresuid(drop_to, drop_to, drop_to)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # kept over exec; for when what watches is killed
    libc.syscall(
        job["keyctl"], KEYCTL_JOIN_SESSION_KEYRING, None
    )  # where the kernel has no keys there are none
    _filter(bytes.fromhex(job["filter"]))


def _watch(step: dict[str, Any], job: dict[str, Any], started: tuple[int, int, int]) -> dict[str, Any]:
    """Waits for a command and stops it where it goes over a limit. Nothing of it is left afterwards."""
    pid, output, seal = started
    for pipe in (output, seal):
        os.set_blocking(pipe, False)
    begin = look = time.monotonic()
    tail, stopped, status, used, sealed = b"", "", None, 0.0, False
    ended = os.pidfd_open(pid)
    sources = [output, ended]
    while status is None and not stopped:
        ready = select.select(sources, [], [], TICK_S)[0]
        if ended in ready:
            _, raw, usage = os.wait4(pid, 0)
            status, used = os.waitstatus_to_exitcode(raw), usage.ru_utime + usage.ru_stime
        elif time.monotonic() >= look:
            stopped = _over_limit(step, job, time.monotonic() - begin)
            _reap(except_for=pid)
            look = time.monotonic() + TICK_S * (5 if job["isolation"] == "none" else 1)
        if output in ready:
            piece = os.read(output, 1 << 20)  # all that a pipe holds
            tail = (tail + piece)[-job["output_bytes"] :]
            sources = sources if piece else [ended]
    seconds = time.monotonic() - begin
    _kill_all(pid, job)
    with contextlib.suppress(BlockingIOError):
        sealed = os.read(seal, 1 << 16).decode(errors="replace") == step["nonce"]
    for pipe in (output, seal, ended):
        os.close(pipe)
    if status == -signal.SIGXCPU or (status == -signal.SIGKILL and used >= step["seconds"]):
        stopped = "time"  # of the processor
    return {
        "status": -signal.SIGKILL if status is None else status,
        "stopped": stopped,
        "seconds": seconds,
        "output": tail.decode(errors="replace"),
        "sealed": sealed,
    }


def _over_limit(step: dict[str, Any], job: dict[str, Any], seconds: float) -> str:
    if seconds > step["seconds"]:
        return "time"
    threads = 0
    resident: dict[int, int] = {}  # bytes
    for pid, fields in _processes(job):
        threads += int(fields[17])
        resident[pid] = int(fields[21]) * resource.getpagesize()
    if threads >= job["processes"]:
        return "processes"
    # what forked processes share is counted in each of them: look closer only where that makes too much
    over = sum(resident.values()) > step["memory_bytes"]
    over = over and sum(_shared_out(pid, most) for pid, most in resident.items()) > step["memory_bytes"]
    return "memory" if over else ""


def _shared_out(pid: int, most: int) -> int:
    """Resident bytes of a process, what n processes share counted as 1/n; `most` if that is hidden."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            found = [line.split() for line in file if line.startswith("Pss:")]
    except PermissionError:
        return most
    except OSError:  # it has ended
        return 0
    return int(found[0][1]) << 10 if found else 0


def _processes(job: dict[str, Any]) -> Iterator[tuple[int, list[str]]]:
    """What the commands have running: id, and the fields of /proc/ID/stat from the state (its third) on."""
    found: dict[int, list[str]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/stat", errors="replace") as file:
                    found[int(name)] = file.read().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
    if job["isolation"] != "none":  # a process namespace holds nothing else
        yield from found.items()
        return
    ours = {os.getpid()}
    while more := {pid for pid, fields in found.items() if int(fields[1]) in ours} - ours:
        ours |= more
    yield from ((pid, found[pid]) for pid in ours - {os.getpid()})


def _kill_all(group: int, job: dict[str, Any]) -> None:
    """Kills a command's process group at one stroke, then who has left it, until no process is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    while left := [pid for pid, _ in _processes(job)]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap()
        time.sleep(0.001)


def _reap(except_for: int | None = None) -> None:
    """Collects orphans that have ended; `except_for` is waited for elsewhere."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == except_for:
            return
        os.waitpid(ended.si_pid, 0)


def _die_with(parent: int) -> None:
    """Asks to be killed when the parent ends, however it ends."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise Refused("the process that asked for this has ended")


def _prctl(option: int, value: int) -> None:
    _call("prctl", libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def _filter(program: bytes) -> None:
    text = ctypes.create_string_buffer(program)  # must live until the kernel has read it
    rule = struct.pack("@HP", len(program) // 8, ctypes.addressof(text))  # struct sock_fprog
    _call("seccomp", libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), rule, 0, 0))


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    data = None if options is None else options.encode()
    _call(f"mount {target}", libc.mount(*texts, ctypes.c_ulong(flags), data))


def _call(what: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise Refused(f"{what}: {os.strerror(number)}")


def _put(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8", errors="replace") as file:
        file.write(text)


if __name__ == "__main__":
    main()
