from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.errors import InputError
from fedtune.evaluation import sandbox, system_calls
from fedtune.evaluation.sandbox import Finished, Isolation, Step

PYTHON = os.path.realpath(sys.executable)
READABLE = (Path(sys.base_prefix),)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="generated code is run on Linux only")


@pytest.fixture(params=["namespaces", "none"])
def isolation(request: pytest.FixtureRequest) -> Isolation:
    if request.param == "namespaces":
        _permitted()
    return request.param


@pytest.fixture
def namespaces() -> Isolation:
    _permitted()
    return "namespaces"


def _permitted() -> None:
    try:
        sandbox.check("namespaces")
    except InputError as error:
        pytest.skip(f"this system permits no namespaces: {error}")


@pytest.fixture
def marker() -> str:
    """A name for a program's file by which its processes can be found; there are none of it afterwards."""
    return f"program_{uuid.uuid4().hex}.py"


def run(
    program: str,
    isolation: Isolation,
    *,
    name: str = "main.py",
    seconds: float = 20.0,
    memory_mb: int = 256,
    address_space: bool = False,
) -> Finished:
    step = Step((PYTHON, "-I", "-S", name), seconds, memory_mb, address_space)
    files = {name: textwrap.dedent(program)}
    return sandbox.run(files, [step], isolation=isolation, readable=READABLE)[-1]


def running(marker: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        if marker.encode() in command:
            found.append(process.name)
    return found


def test_a_program_sees_its_own_folder_and_three_variables(
    isolation: Isolation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = run(
        """
        import json, os
        open("written", "w").write("x")
        names = [name for name in os.environ if name != "LC_CTYPE"]  # Python's own
        print(json.dumps([sorted(os.listdir(".")), sorted(names), os.getcwd() == os.environ["TMPDIR"]]))
        """,
        isolation,
    )
    assert done.ok
    assert json.loads(done.output) == [["main.py", "written"], ["LANG", "PATH", "TMPDIR"], True]
    assert list(tmp_path.iterdir()) == []  # the folder is gone


def test_limits_are_set_for_every_command(isolation: Isolation) -> None:
    done = run(
        """
        import resource as r
        print([r.getrlimit(k) for k in (r.RLIMIT_CPU, r.RLIMIT_AS, r.RLIMIT_CORE, r.RLIMIT_FSIZE)])
        """,
        isolation,
        seconds=6.5,
        memory_mb=200,
        address_space=True,
    )
    assert done.output.strip() == str([(7, 8), (200 << 20,) * 2, (0, 0), (32 << 20,) * 2])


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(1000)"])
def test_a_program_that_does_not_end_is_stopped(program: str, isolation: Isolation, marker: str) -> None:
    done = run(program, isolation, name=marker, seconds=0.5)
    assert (done.stopped, done.ok) == ("time", False)
    assert running(marker) == []


def test_one_process_that_fills_memory_is_refused_more(isolation: Isolation) -> None:
    done = run("x = []\nwhile True: x.append(bytearray(1 << 20))", isolation, address_space=True)
    assert (done.status, done.stopped) == (1, "")
    assert done.output.endswith("MemoryError\n")


def test_resident_memory_is_counted_over_all_processes(isolation: Isolation, marker: str) -> None:
    done = run(
        """
        import os, time
        for child in range(4):
            if os.fork() == 0:
                break
        filled = bytearray(b"x") * (70 << 20)  # 5 processes of 70 MiB each; 256 are allowed
        time.sleep(1000)
        """,
        isolation,
        name=marker,
        address_space=True,
    )
    assert done.stopped == "memory"
    assert running(marker) == []


def test_memory_that_processes_share_is_counted_once(isolation: Isolation) -> None:
    done = run(
        """
        import os, time
        filled = bytearray(b"x") * (100 << 20)  # of 256 MiB, by five processes
        children = []
        while len(children) < 4:
            if (child := os.fork()) == 0:
                time.sleep(0.5)
                os._exit(0)
            children.append(child)
        print([os.waitpid(child, 0)[1] for child in children])
        """,
        isolation,
    )
    assert (done.stopped, done.output) == ("", "[0, 0, 0, 0]\n")


def test_a_fork_bomb_is_stopped_and_leaves_nothing(isolation: Isolation, marker: str) -> None:
    done = run(
        """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """,
        isolation,
        name=marker,
        memory_mb=2048,
    )
    assert done.stopped == "processes"
    assert running(marker) == []


def test_what_a_program_leaves_running_is_killed(isolation: Isolation, marker: str) -> None:
    done = run(
        """
        import os, time
        if os.fork() == 0:
            os.setsid()  # out of its session and process group
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        os.wait()
        print("done")
        """,
        isolation,
        name=marker,
    )
    assert done.ok and done.output == "done\n"
    assert running(marker) == []


def test_a_background_process_that_keeps_printing_does_not_hold_up_the_end(
    isolation: Isolation, marker: str
) -> None:
    done = run(
        """
        import os
        if os.fork() == 0:
            while True:
                os.write(1, b"noise " * 1000)
        os._exit(3)
        """,
        isolation,
        name=marker,
    )
    assert (done.status, done.stopped) == (3, "")
    assert running(marker) == []


def test_programs_end_when_fedtune_is_killed(isolation: Isolation, marker: str, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom fedtune.evaluation import sandbox\n"
        f"step = sandbox.Step(({PYTHON!r}, '-I', '-S', {marker!r}), 1000.0, 256)\n"
        f"sandbox.run({{{marker!r}: 'import time; time.sleep(1000)'}}, [step], isolation={isolation!r},\n"
        "            readable=[sys.base_prefix])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        _until(lambda: set(running(marker)) - {str(parent.pid)})
    finally:
        parent.kill()
        parent.wait()
    _until(lambda: running(marker) == [])
    assert isolation == "none" or list(tmp_path.iterdir()) == []


def _until(condition: Callable[[], object]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("waited for 30 seconds")


def test_output_is_bounded_and_its_end_kept(isolation: Isolation) -> None:
    done = run("for i in range(20_000): print(i, 'x' * 50)\nprint('the end')", isolation)
    assert done.ok
    assert len(done.output) == sandbox.MAX_OUTPUT_BYTES
    assert done.output.endswith("19999 " + "x" * 50 + "\nthe end\n")


def test_output_that_is_no_text_is_kept_as_far_as_it_is(isolation: Isolation) -> None:
    assert run("import os; os.write(1, b'a\\xff\\x00b')", isolation).output == "a\ufffd\x00b"


def test_one_file_is_bounded(isolation: Isolation) -> None:
    done = run("open('big', 'wb').write(bytes(40 << 20))", isolation)
    assert done.status == 1 and "File too large" in done.output


def test_all_files_together_are_bounded(namespaces: Isolation) -> None:
    done = run("for i in range(100): open(str(i), 'wb').write(bytes(8 << 20))", namespaces)
    assert done.status == 1 and "No space left on device" in done.output


def test_nothing_outside_can_be_written_or_read(namespaces: Isolation, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("hunter2")
    done = run(
        f"""
        import os
        places = [{str(tmp_path)!r}, {str(Path.home())!r}, "/usr", "/", "/dev", "/proc/sys/kernel"]
        for place in places:
            try:
                open(place + "/{tmp_path.name}", "w").write("x")
                print("wrote", place)
            except OSError:
                pass
        print(os.path.exists({str(tmp_path / "private")!r}), os.path.exists("/etc/passwd"), os.getuid())
        """,
        namespaces,
    )
    assert done.ok and done.output == "False False 1000\n"
    assert [path.name for path in tmp_path.iterdir()] == ["private"]


def test_no_network_not_even_this_machine(namespaces: Isolation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"""
        import socket
        try:
            socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 5)
            print("connected")
        except OSError as error:
            print("refused")
        print([name for _, name in socket.if_nameindex()])
        """
        done = run(program, namespaces)
        assert done.output.startswith("refused\n") and "eth" not in done.output
        assert run(program, "none").output.startswith("connected\n")  # as its description says


def test_a_program_can_neither_see_nor_end_what_watches_it(namespaces: Isolation) -> None:
    done = run(
        """
        import os, signal
        print(sorted(int(name) for name in os.listdir("/proc") if name.isdigit()) == [1, os.getpid()])
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
            try:
                os.kill(1, number)
            except PermissionError:
                pass
        for name in ("0", "1", "3", "4"):
            try:
                os.open(f"/proc/1/fd/{name}", os.O_RDWR)
                print("opened", name)
            except OSError:
                pass
        print("alive")
        """,
        namespaces,
    )
    assert done.ok and done.output == "True\nalive\n"


def test_a_program_that_kills_all_that_it_can_is_one_failure(isolation: Isolation, marker: str) -> None:
    if isolation == "none":
        program = "import os; os.kill(os.getppid(), 9)"  # what watches it; kill(-1) would be the whole user
    else:
        program = "import os, time\nos.kill(-1, 9)\ntime.sleep(1)\nraise SystemExit(3)"
    done = run(program, isolation, name=marker)
    assert not done.ok
    _until(lambda: running(marker) == [])


def test_programs_get_no_namespaces_of_their_own_so_a_refusal_is_seen_there(namespaces: Isolation) -> None:
    """Inside of the sandbox the sandbox itself is not permitted: it says so, and runs nothing."""
    child = Path(sandbox.__file__).with_name("sandbox_child.py")
    job = {
        "parent": 1,
        "isolation": "namespaces",
        "root": "/sandbox",
        "readable": [],
        "files": {},
        "steps": [{"command": ["echo", "ran"]}],
    }
    step = Step(("sh", "-c", f"exec {PYTHON} -I -S {child.name} < job.json"), 20.0, 256)
    files = {"job.json": json.dumps(job), child.name: child.read_text()}
    done = sandbox.run(files, [step], isolation="namespaces", readable=READABLE)[0]
    assert json.loads(done.output) == {"refused": "unshare: Operation not permitted"}


CALLS = """
import ctypes, json, platform, sys
libc = ctypes.CDLL(None, use_errno=True)
found = {}
for name, number in json.loads(sys.argv[1]).items():
    ctypes.set_errno(0)
    done = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6)
    found[name] = ctypes.get_errno() if done == -1 else 0
print(json.dumps(found))
"""


def test_calls_that_no_such_program_needs_are_refused_by_the_kernel(isolation: Isolation) -> None:
    numbers = system_calls.refused(platform.machine())
    step = Step((PYTHON, "-c", CALLS, json.dumps(numbers)), 20.0, 256)
    done = sandbox.run({}, [step], isolation=isolation, readable=READABLE)[0]
    found = json.loads(done.output)
    missing = {"memfd_create", "memfd_secret", "io_uring_setup", "userfaultfd"}
    assert found == {name: errno.ENOSYS if name in missing else errno.EPERM for name in numbers}


def test_a_filter_is_for_this_kind_of_program_alone() -> None:
    """Worked out by hand for x86-64: what is loaded, compared and returned."""
    lines = list(struct.iter_unpack("=HBBI", system_calls.program("x86_64")))
    assert lines[:6] == [
        (0x20, 0, 0, 4),
        (0x15, 1, 0, 0xC000003E),
        (0x06, 0, 0, 0x80000000),
        (0x20, 0, 0, 0),
        (0x35, 0, 1, 0x40000000),
        (0x06, 0, 0, 0x80000000),
    ]
    assert lines[6:8] == [(0x15, 0, 1, 248), (0x06, 0, 0, 0x00050001)]  # add_key: EPERM
    assert lines[-1] == (0x06, 0, 0, 0x7FFF0000)
    assert len(lines) == 18 + 2 * len(system_calls.refused("x86_64"))
    assert lines[-12:-6] == [
        (0x15, 0, 5, 9),  # mmap; otherwise past all of this
        (0x20, 0, 0, 40),  # its flags
        (0x54, 0, 0, 0x21),
        (0x15, 0, 1, 0x21),
        (0x06, 0, 0, 0x00050001),
        (0x06, 0, 0, 0x7FFF0000),
    ]
    assert lines[-6:] == [
        (0x15, 0, 4, 41),  # socket; otherwise to the last line
        (0x20, 0, 0, 16),  # its family
        (0x15, 2, 0, 2),
        (0x15, 1, 0, 10),
        (0x06, 0, 0, 0x00050000 | 97),
        (0x06, 0, 0, 0x7FFF0000),
    ]
    arm = system_calls.refused("aarch64")
    assert (arm["keyctl"], arm["mount"]) == (219, 40) and "iopl" not in arm


def test_there_is_no_memory_that_no_process_shows(namespaces: Isolation) -> None:
    done = run(
        """
        import mmap, os, socket
        tries = {
            "shared": lambda: mmap.mmap(-1, 1 << 20),
            "zero": lambda: os.open("/dev/zero", os.O_RDWR),
            **{str(kind): lambda kind=kind: socket.socket(kind, 1) for kind in (1, 16, 17, 38, 40)},
        }
        for name, attempt in tries.items():
            try:
                attempt()
                print(name, "could be had")
            except OSError:
                pass
        mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)[0] = 1
        open("a", "wb").write(bytes(8192))
        mmap.mmap(os.open("a", os.O_RDWR), 8192)[1] = 2
        print(open("a", "rb").read(2), socket.socket().family)
        """,
        namespaces,
    )
    assert done.output == "b'\\x00\\x02' 2\n" or done.output == "b'\\x00\\x02' AddressFamily.AF_INET\n"


KEYS = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
call, ring = ctypes.c_long(int(sys.argv[1])), ctypes.c_long(-4)  # the user's keyring
key = libc.syscall(call, ctypes.c_long(10), ring, b"user", b"fedtune test token", 0)  # search
text = ctypes.create_string_buffer(64)
read = libc.syscall(call, ctypes.c_long(11), ctypes.c_long(key), text, 64) if key > 0 else 0
print(read > 0 and text.value.decode())
"""


def test_the_users_keys_cannot_be_read(isolation: Isolation) -> None:
    numbers, libc = system_calls.refused(platform.machine()), ctypes.CDLL(None, use_errno=True)
    planted = libc.syscall(
        numbers["add_key"], b"user", b"fedtune test token", b"secret", 6, ctypes.c_long(-4)
    )
    if planted < 0:
        pytest.skip(f"this kernel keeps no keys for this user: {os.strerror(ctypes.get_errno())}")
    command = (PYTHON, "-c", KEYS, str(numbers["keyctl"]))
    try:
        outside = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        done = sandbox.run({}, [Step(command, 20.0, 256)], isolation=isolation, readable=READABLE)[0]
    finally:
        libc.syscall(numbers["keyctl"], 21, ctypes.c_long(planted))  # invalidate
    assert "secret" in outside and done.output.strip() == "False"


@pytest.mark.parametrize("machine", ["riscv64", "i686"])
def test_processors_whose_calls_are_not_known_are_refused(
    machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(InputError, match=f"x86-64 or arm64 processor, got {machine}"):
        sandbox.check("none")


def test_a_refusal_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sandbox, "run_child", lambda job, patience: {"refused": "unshare: Operation not permitted"}
    )
    with pytest.raises(InputError, match=r"unshare: Operation not permitted.*evaluation\.code\.isolation"):
        sandbox.check("namespaces")


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError, match="needs Linux, got darwin"):
        sandbox.check("none")


def test_a_command_that_is_not_there_is_an_error_and_no_failure(isolation: Isolation) -> None:
    with pytest.raises(InputError, match="cannot start no-such-compiler"):
        sandbox.run({}, [Step(("no-such-compiler",), 5.0, 256)], isolation=isolation)


def test_commands_share_the_folder_and_stop_at_the_first_failure(isolation: Isolation) -> None:
    steps = [Step(("sh", "-c", text), 20.0, 256) for text in ("echo a > made", "cat made; exit 7", "echo no")]
    done = sandbox.run({"in/side.txt": ""}, steps, isolation=isolation)
    assert [(each.status, each.output) for each in done] == [(0, ""), (7, "a\n")]


def test_what_watches_is_itself_given_up_in_time(
    isolation: Isolation, marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "GRACE_S", -998.0)  # two seconds of patience with a limit of a thousand
    done = run("import time; time.sleep(1000)", isolation, name=marker, seconds=1000.0)
    assert done.stopped == "time"
    _until(lambda: running(marker) == [])
