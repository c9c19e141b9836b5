"""The sandbox: what programs may do, and what none of them may, however they try."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from potstill.errors import DataError, UserError
from potstill.generation import sandbox
from potstill.generation.sandbox import ProgramLimits, require_sandbox, run_program

try:
    require_sandbox()
    missing = ""
except UserError as error:
    missing = str(error)
needs_sandbox = pytest.mark.skipif(bool(missing), reason=missing)

SHORT = ProgramLimits(cpu_seconds=2, wall_seconds=30.0, memory_mib=256, output_kib=10)

# Each is the body of a function. It escaped when it returns; to be refused is an OSError or a MemoryError.
SYSCALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)
def syscall(number, *arguments):
    if libc.syscall(number, *arguments) == -1:
        raise OSError(ctypes.get_errno(), str(number))
"""
NETWORK = {
    "tcp to the host": "import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
    "udp": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    "names": "import socket; socket.getaddrinfo('pypi.org', 443)",
    "http": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=2)",
    "a unix socket": "import socket; socket.socket(socket.AF_UNIX).connect('/run/dbus/system_bus_socket')",
    "an abstract socket": "import socket; socket.socket(socket.AF_UNIX).connect('\\0potstill')",
    "a pair of sockets": "import socket; socket.socketpair()",
    "a raw socket by hand": SYSCALL + "call('socket', 17, 3, 0)",
    "netlink": "import socket; socket.socket(16, 3, 0)",
}
FILES = {
    "a file of the user's": "open({secret!r}).read()",
    "the home folder": "import os; os.listdir({home!r})",
    "the folder it was started in": "import os; os.listdir({here!r})",
    "up and away": "open('../../../../../..' + {secret!r}).read()",
    "passwords": "open('/etc/passwd').read()",
    "a file descriptor left open": "import os; print([os.fstat(fd) for fd in range(3, 64)])",
    "an open folder to climb from": "import os; os.open('..', os.O_RDONLY, dir_fd=3)",
    "a shell": "import os; os.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])",
    "its own environment by /proc": "open('/proc/self/environ').read()",
    "the root of another process": "import os; os.listdir('/proc/1/root')",
    "/sys": "import os; os.listdir('/sys')",
    "the memory of the machine": "open('/dev/mem', 'rb').read(1)",
    "the log of the kernel": "open('/dev/kmsg', 'rb').read(1)",
    "a new device": "import os, stat; os.mknod('/dev/disk', 0o666 | stat.S_IFBLK, os.makedev(8, 0))",
    "a file in the root": "open('/x', 'w')",
    "a file in /tmp": "open('/tmp/x', 'w')",
    "a file in shared memory": "open('/dev/shm/x', 'w')",
    "a file among the libraries": "open('/usr/lib/x', 'w')",
    "a file beside the interpreter": "import os, sys; open(os.path.dirname(os.__file__) + '/x.py', 'w')",
    "a symbolic link": "import os; os.symlink({secret!r}, '/dev/link'); open('/dev/link').read()",
    "a hard link": "import os; os.link('/dev/null', '/dev/link')",
    "a changed mode": "import os; os.chmod(os.__file__, 0o777)",
    "a temporary file": "import tempfile; tempfile.TemporaryFile()",
    "a file by its handle": SYSCALL + "call('open_by_handle_at', 0, 0, 0)",
    "the terminal": "open('/dev/tty')",
    "keys of ssh": "import os; os.listdir('/root/.ssh')",
    "the socket of docker": "open('/var/run/docker.sock')",
    "the handler of crashes": "open('/proc/sys/kernel/core_pattern', 'w')",
    "limits of groups": "import os; os.listdir('/sys/fs/cgroup')",
}
PROCESSES = {
    "fork": "import os; os.fork()",
    "a bomb of forks": "import os\nwhile True: os.fork()",
    "clone by hand": SYSCALL + "syscall({clone}, 17, 0, 0, 0, 0)",
    "a subprocess": "import subprocess, sys; subprocess.run([sys.executable, '-c', '1'])",
    "multiprocessing": "import multiprocessing as m; p = m.get_context('fork').Process(target=print); p.start()",
    "posix_spawn": "import os, sys; os.posix_spawn(sys.executable, ['python'], {{}})",
    "a daemon left behind": "import os\nif os.fork() == 0:\n    os.setsid()\n    import time; time.sleep(60)",
    "a thread": "import _thread\ntry: _thread.start_new_thread(print, ())\nexcept RuntimeError as e: raise OSError(e)",
    "a signal to the parent": "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    "a signal to everyone": "import os, signal; os.kill(-1, signal.SIGKILL)",
    "a signal to the host's process": "import os, signal; os.kill({pid}, signal.SIGTERM)",
    "a signal to the group": "import os, signal; os.killpg(0, signal.SIGKILL)",
    "ptrace": SYSCALL + "call('ptrace', 16, 1, 0, 0)",
    "the memory of another process": SYSCALL + "call('process_vm_readv', 1, 0, 0, 0, 0, 0)",
    "a handle of another process": "import os; os.pidfd_open(1)",
}
RIGHTS = {
    "root": "import os; os.setuid(0)",
    "root by hand": SYSCALL + "call('setresuid', 0, 0, 0)",
    "a user namespace": SYSCALL + "call('unshare', 0x10000000)",
    "the namespace of another": SYSCALL + "call('setns', 0, 0)",
    "a mount": SYSCALL + "call('mount', b'proc', b'/dev', b'proc', 0, None)",
    "a writable root": SYSCALL + "call('mount', None, b'/', None, 32, None)",
    "an unmount": SYSCALL + "call('umount2', b'/usr/lib', 2)",
    "chroot": "import os; os.chroot('/usr')",
    "higher limits": (
        "import resource as r\ntry: r.setrlimit(r.RLIMIT_AS, (-1, -1))\nexcept ValueError as e: raise OSError(e)"
    ),
    "priority": "import os; os.setpriority(os.PRIO_PROCESS, 0, -20)",
    "keys pressed on the terminal": "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSTI, b'x')",
    "a kernel program": SYSCALL + "syscall({bpf}, 0, 0, 0)",
    "a ring": SYSCALL + "syscall(425, 8, 0)",  # io_uring_setup has one number everywhere
    "memory without a file": "import os; os.memfd_create('x')",
    "shared memory": SYSCALL + "call('shmget', 0, 1 << 20, 0o1600)",
    "the name of the machine": "import socket; socket.sethostname('x')",
    "another file system": SYSCALL + "syscall(430, b'tmpfs', 0)",  # fsopen, move_mount: one number everywhere
    "a mount that is moved": SYSCALL + "syscall(429, 0, b'/usr', 0, b'/dev', 0)",
    "a copy of the tree": SYSCALL + "syscall(428, -100, b'/', 1)",
    "memory that is hidden": SYSCALL + "syscall(447, 0)",
}
ATTEMPTS = NETWORK | FILES | PROCESSES | RIGHTS


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """What there is to be reached: a secret, a server, a process."""
    home = tmp_path_factory.mktemp("home")
    secret = home / "secret"
    secret.write_text("secret")
    arm = os.uname().machine == "aarch64"
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {
            "secret": str(secret),
            "home": str(home),
            "here": str(Path.cwd()),
            "port": server.getsockname()[1],
            "pid": os.getpid(),
            "clone": 220 if arm else 56,
            "bpf": 280 if arm else 321,
        }


def program(attempt: str, host: dict[str, object]) -> str:
    body = textwrap.indent(attempt.format(**host), "    ")
    ending = "try:\n    attempt()\nexcept (OSError, MemoryError):\n    print('refused')\nelse:\n    print('ESCAPED')\n"
    return f"def attempt():\n{body}\n{ending}"


def descendants(ancestor: int) -> set[int]:
    """All processes that come from one."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True, check=True).stdout
    family = {ancestor}
    for pid, parent, command in (line.split(None, 2) for line in listed.splitlines()):
        if int(parent) in family and command != "ps":
            family.add(int(pid))
    return family - {ancestor}


def soon(condition: Callable[[], bool]) -> bool:
    """Whether it holds within some seconds."""
    return any(condition() or time.sleep(0.05) for _ in range(200))


@needs_sandbox
@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_no_attempt_escapes(attempt: str, host: dict[str, object]) -> None:
    outcome = run_program(program(ATTEMPTS[attempt], host), SHORT)
    assert (outcome.ending, outcome.output) == ("done", "refused\n"), outcome


@pytest.mark.parametrize("attempt", ["tcp to the host", "a file of the user's", "the home folder", "fork", "passwords"])
def test_outside_of_the_sandbox_the_same_attempts_succeed(attempt: str, host: dict[str, object]) -> None:
    """Else the test above would prove nothing."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program(ATTEMPTS[attempt], host)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ESCAPED" in done.stdout, done


BOMBS = {
    "memory": ("x = [0] * 10**9", "failed"),
    "memory piece by piece": ("x = []\nwhile True: x.append(bytearray(10**6))", "failed"),
    "memory by mmap": ("import mmap; mmap.mmap(-1, 10**9)", "failed"),
    "depth": ("import json; json.loads('[' * 10**6)", "failed"),
    "a program that does not end": ("while True: pass", "time"),
    "a signal ignored": (
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\n"
        "while True: pass",
        "time",
    ),
    "a number too large": ("x = 10**(10**8); y = x * x * x", "time"),
    "sleep": ("import time; time.sleep(600)", "time"),
    "waiting for input": ("input()", "failed"),
    "endless output": ("while True: print('x' * 1000)", "output"),
    "endless output that goes on": (
        "import os\nwhile True:\n    try: os.write(1, b'x' * 1000)\n    except OSError: pass",
        "output",
    ),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "failed"),
    "a file with a hole": ("import os; os.truncate(1, 10**12)", "failed"),
    "a hole by seek": ("import os; os.lseek(1, 10**12, 0); os.write(1, b'x')", "failed"),
    "a crash": ("import ctypes; ctypes.string_at(0)", "failed"),
}


@needs_sandbox
@pytest.mark.parametrize("bomb", BOMBS)
def test_no_bomb_goes_off(bomb: str) -> None:
    source, ending = BOMBS[bomb]
    # On a busy machine, to fill the memory takes more than a second.
    processor = 1 if ending == "time" or bomb == "endless output that goes on" else 20
    limits = ProgramLimits(processor, 1.0 if bomb == "sleep" else 30.0, SHORT.memory_mib, SHORT.output_kib)
    outcome = run_program(source, limits)
    assert outcome.ending == ending, outcome
    assert len(outcome.output) <= limits.output_kib * 2**10
    assert len(outcome.errors) <= 2000


BY_HAND = """
import ctypes, mmap
memory = mmap.mmap(-1, 4096, prot=7)
memory.write(bytes([0xB8, {number}, 0, 0, {mode}, {call}, 0xC3]))
print("ran", ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))())
"""


@needs_sandbox
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the machine code is of x86-64")
def test_calls_of_another_architecture_do_not_pass_the_filter_by() -> None:
    native, of_32_bits = "0x0F, 0x05", "0xCD, 0x80"
    assert run_program(BY_HAND.format(number=39, mode=0, call=native)).output.startswith("ran ")  # getpid
    assert run_program(BY_HAND.format(number=57, mode=0, call=native)).output == "ran -1\n"  # fork
    for number, mode, call in ((2, 0, of_32_bits), (20, 0, of_32_bits), (57, 0x40, native)):
        outcome = run_program(BY_HAND.format(number=number, mode=mode, call=call))
        assert (outcome.ending, outcome.output) == ("failed", "")


@needs_sandbox
def test_nothing_is_left_running() -> None:
    before = descendants(os.getpid())
    run_program("import time; time.sleep(600)", ProgramLimits(wall_seconds=0.5))
    assert soon(lambda: descendants(os.getpid()) <= before)


@needs_sandbox
def test_the_sandbox_dies_with_the_one_who_started_it() -> None:
    script = "from potstill.generation.sandbox import ProgramLimits, run_program; "
    script += "run_program('print(1)'); print('up', flush=True); "
    script += "run_program('import time; time.sleep(600)', ProgramLimits(wall_seconds=600))"
    starter = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    assert starter.stdout.readline() == "up\n"
    assert soon(lambda: len(descendants(starter.pid)) >= 3)  # outside, the first of its processes, and the program
    pids = descendants(starter.pid)
    starter.kill()
    starter.wait()
    starter.stdout.close()
    assert soon(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


@needs_sandbox
def test_programs_compute_and_print() -> None:
    source = "import math, fractions, itertools, decimal\nprint(math.comb(10, 3), fractions.Fraction(1, 3) * 6, 'é')"
    assert run_program(source) == sandbox.ProgramOutcome("done", "120 2 é\n", "")
    assert run_program("print({'a', 'b', 'c', 'd'})") == run_program("print({'a', 'b', 'c', 'd'})")
    failed = run_program("print(1)\n1 / 0")
    assert (failed.ending, failed.output) == ("failed", "1\n")
    assert failed.errors.endswith("ZeroDivisionError: division by zero\n")
    assert run_program("import sys; sys.exit(3)").ending == "failed"
    assert run_program("print('\ud800')").ending == "failed"


@needs_sandbox
def test_no_secret_of_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    assert "secret" not in run_program("import os; print(dict(os.environ))").output


def test_without_a_sandbox_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    require_sandbox.cache_clear()
    try:
        with pytest.raises(DataError, match=r"expected bubblewrap, got none.*apt-get install bubblewrap"):
            run_program(f"open({str(tmp_path / 'ran')!r}, 'w')")
    finally:
        require_sandbox.cache_clear()
    assert not (tmp_path / "ran").exists()


def test_a_sandbox_that_does_not_start_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(fake) if name == "bwrap" else f"/usr/bin/{name}")
    require_sandbox.cache_clear()
    try:
        with pytest.raises(DataError, match=r"does not start .*No permissions.*Allow unprivileged user namespaces"):
            run_program("print(1)")
    finally:
        require_sandbox.cache_clear()
