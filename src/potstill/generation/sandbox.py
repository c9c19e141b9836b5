"""Run programs that a model wrote in a sandbox, or not at all.

Bubblewrap gives the program namespaces of its own (users, processes, network, IPC, host name, mounts): it sees the
interpreter, the system's libraries and nothing else, all of it read-only; no /proc, no /sys, no /tmp, and of /dev null,
zero and urandom. A seccomp filter refuses new processes and threads, sockets, and what makes memory that limits do not
count. The kernel's limits end what runs too long, takes too much memory or prints too much. A program is Python with
its standard library, without a place to write to; what it prints is what comes back.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal

from potstill.errors import DataError, one_line
from potstill.losses.declared import Range, Record


@dataclass(frozen=True)
class ProgramLimits(Record):
    """What a program may use.

    Args:
        cpu_seconds: processor time.
        wall_seconds: time until it is killed; a fresh interpreter takes a twentieth of a second.
        memory_mib: address space.
        output_kib: what it may print, and again as much on stderr.
    """

    cpu_seconds: Annotated[int, Range(ge=1)] = 5
    wall_seconds: Annotated[float, Range(gt=0)] = 10.0
    memory_mib: Annotated[int, Range(ge=64)] = 512
    output_kib: Annotated[int, Range(ge=1)] = 64


Ending = Literal["done", "failed", "time", "output"]


@dataclass(frozen=True)
class ProgramOutcome:
    """How a program ended: done (exit status 0), failed (any other, or killed), time, or output (too much of it)."""

    ending: Ending
    output: str
    errors: str  # the end of its stderr


def run_program(source: str, limits: ProgramLimits = ProgramLimits()) -> ProgramOutcome:
    """Run a Python program in the sandbox; see `require_sandbox`."""
    require_sandbox()
    return _run(source, limits)


@functools.cache
def require_sandbox() -> None:
    """Check, once, that the sandbox is installed and works; the DataError says what is missing and what to install."""
    missing = [name for name in ("bwrap", "prlimit") if shutil.which(name) is None]
    if not sys.platform.startswith("linux"):
        raise _no_sandbox(f"the system {sys.platform}", "Run it on Linux")
    if _seccomp() is None:
        missing.append("libseccomp")
    if missing:
        raise _no_sandbox(
            f"none: {' and '.join(missing)} cannot be found",
            "Install it: apt-get install bubblewrap libseccomp2 util-linux",
        )
    trial = _run("print(6 * 7)", ProgramLimits())
    if (trial.ending, trial.output) != ("done", "42\n"):
        reason = one_line(trial.errors)[-300:] or f"it ended with {trial.ending!r}"
        raise _no_sandbox(
            f"one that does not start ({reason})",
            "Allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, or "
            "kernel.apparmor_restrict_unprivileged_userns=0), or run outside of a container that forbids them",
        )


def _no_sandbox(got: str, remedy: str) -> DataError:
    return DataError(
        f"sandbox: expected bubblewrap, got {got}. Programs that a model wrote are not run without it. {remedy}."
    )


def _content(file: IO[bytes]) -> bytes:
    """Read a file whose position a program may still move: it shares it, and ends a moment after its sandbox."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)


def _run(source: str, limits: ProgramLimits) -> ProgramOutcome:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as seccomp:
        seccomp.write(_compiled_filter())
        seccomp.seek(0)
        try:
            status = subprocess.run(
                _command(limits, seccomp.fileno()),
                # No program can hold half a surrogate pair: the interpreter refuses it.
                input=source.encode("utf-8", errors="surrogatepass"),
                stdout=out,
                stderr=err,
                pass_fds=(seccomp.fileno(),),
                timeout=limits.wall_seconds,
                env=_ENVIRONMENT,
                cwd="/",
                start_new_session=True,
                check=False,
            ).returncode
            ending: Ending = "done" if status == 0 else "failed"
            if status in (128 + 9, 128 + 24, -9, -24):  # the kernel's answer to cpu_seconds
                ending = "time"
        except subprocess.TimeoutExpired:
            ending = "time"
        output, errors = _content(out), _content(err)
    if len(output) >= limits.output_kib * 2**10:
        ending = "output"
    return ProgramOutcome(ending, output.decode(errors="replace"), errors[-2000:].decode(errors="replace"))


# Seeded hashes make the order of sets, and with it what is printed, the same at every run.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "LD_LIBRARY_PATH": "/python/lib", "HOME": "/"}


def _command(limits: ProgramLimits, seccomp: int) -> list[str]:
    """The command line: limits, sandbox, and the interpreter, which reads its program from stdin."""
    bound, python = _interpreter()
    return [
        str(shutil.which("prlimit")),
        f"--cpu={limits.cpu_seconds}",
        f"--as={limits.memory_mib * 2**20}",
        f"--fsize={limits.output_kib * 2**10}",
        *("--core=0", "--nofile=64", "--memlock=0", "--msgqueue=0", "--rtprio=0", "--nice=0"),
        *("--", str(shutil.which("bwrap"))),
        *("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
        *("--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"),
        *("--die-with-parent", "--new-session", "--hostname", "sandbox"),
        *bound,
        *("--dir", "/dev"),
        *(word for name in ("null", "zero", "urandom") for word in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")),
        *("--remount-ro", "/", "--chdir", "/", "--seccomp", str(seccomp)),
        # Without site-packages, and with nothing of its own on the path.
        *("--", python, "-S", "-s", "-P", "-B", "-"),
    ]


def _interpreter() -> tuple[list[str], str]:
    """Bubblewrap's arguments for the files that the interpreter needs, and its path in the sandbox."""
    bound: list[str] = []
    for folder in ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib64"):
        path = Path(folder)
        if path.is_symlink():
            bound += ["--symlink", str(path.readlink()), folder]
        elif path.is_dir():
            bound += ["--ro-bind", folder, folder]
    executable = Path(sys.executable if sys.prefix == sys.base_prefix else sys._base_executable).resolve()  # type: ignore[attr-defined]
    prefix = Path(sys.base_prefix).resolve()
    if prefix == Path("/usr"):  # its library is in /usr/lib, which is there
        return [*bound, "--ro-bind", str(executable), str(executable)], str(executable)
    return [*bound, "--ro-bind", str(prefix), "/python"], f"/python/{executable.relative_to(prefix)}"


# The seccomp filter

_REFUSED = (
    # New processes and threads: without them the limits of one process are those of the program. execve is allowed: the
    # interpreter is started by it, and limits and filter survive it.
    *("fork", "vfork", "clone", "clone3", "execveat"),
    # The network, and sockets of any kind.
    *("socket", "socketpair", "connect", "bind", "listen", "accept", "accept4", "sendto", "sendmsg", "sendmmsg"),
    # Other processes.
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_open", "pidfd_getfd"),
    *("pidfd_send_signal", "kill", "tkill", "setpriority", "sched_setscheduler", "sched_setattr", "ioprio_set"),
    # Memory that no limit counts.
    *("memfd_create", "memfd_secret", "shmget", "shmat", "shmctl", "msgget", "semget", "mq_open", "userfaultfd"),
    # Mounts, namespaces and privileges.
    *("mount", "umount2", "pivot_root", "chroot", "unshare", "setns", "fsopen", "fsmount", "move_mount", "open_tree"),
    *("mount_setattr", "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups", "capset"),
    *("prlimit64", "setrlimit", "personality", "open_by_handle_at", "name_to_handle_at"),
    # Large attack surfaces of the kernel.
    *("bpf", "perf_event_open", "io_uring_setup", "io_uring_enter", "io_uring_register", "keyctl", "add_key"),
    *("request_key", "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot"),
    *("swapon", "swapoff", "syslog", "acct", "quotactl", "fanotify_init", "inotify_init1", "landlock_create_ruleset"),
    *("settimeofday", "clock_settime", "adjtimex", "sethostname", "setdomainname", "iopl", "ioperm", "modify_ldt"),
)
_ALLOW, _ERRNO, _EPERM = 0x7FFF0000, 0x00050000, 1


@functools.cache
def _seccomp() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return None
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    types = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p
    library.seccomp_rule_add_array.argtypes = types
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    return library


@functools.cache
def _compiled_filter() -> bytes:
    """The filter as BPF. Calls of another architecture (32 bits on 64) end the program."""
    library = _seccomp()
    assert library is not None, "require_sandbox comes first"
    rules = library.seccomp_init(_ALLOW)
    try:
        for name in _REFUSED:
            call = library.seccomp_syscall_resolve_name(name.encode())
            # Names that this version does not know are negative, and so are those that this machine does not have.
            if call >= 0 and library.seccomp_rule_add_array(rules, _ERRNO | _EPERM, call, 0, None):
                raise OSError(f"seccomp: no rule for {name}")
        with tempfile.TemporaryFile() as file:
            if library.seccomp_export_bpf(rules, file.fileno()):
                raise OSError("seccomp: the filter cannot be written")
            file.flush()
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            return file.read()
    finally:
        library.seccomp_release(rules)
