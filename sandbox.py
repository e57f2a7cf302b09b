"""Runs model-written Python against its tests and says, unforgeably, which programs pass.

    from sandbox import run_tests
    run_tests([{"code": "def add(a, b): return a + b", "tests": "assert add(1, 2) == 3"}])
    -> [{"passed": True, "reason": "passed", "seconds": 0.004, "tests_passed": 1, "tests_total": 1}]

**Threat model.** A policy trained on this reward finds whatever makes the verdict say "passed", and a base model
writes `os.remove`, `while True` and fork bombs without meaning to. So the program is hostile; the tests and the
owner of the machine are not. Whatever a process prints, returns or exits with when it has succeeded, a program inside
that process can print, return or exit with too: program and test never share a process.

**Processes**, for each worker (a worker is one thread of the caller):

    caller ----- code, limits ----> Z  zygote: a fresh `python -I -S sandbox.py`, confined once; forks per program
      |                             |- C  candidate: a fork of Z that runs one program and dies
      '---- tests / verdict ------- '- T  tester: a fork of Z that runs the trusted tests, job after job
                                 C <---> T  calls and their results, as plain data

- C holds four descriptors: stdin, stdout, stderr and a socket to T. No test is in its memory (it is a copy of Z, which
  reads neither code nor tests) nor in a file that it can open, and it can neither trace nor signal another process.
  All it can do is to answer T's calls, rightly or wrongly.
- T executes the tests. A name that a test does not define is asked from C; a call goes to C as a pickle of the arguments
  and comes back as a pickle of the result, read by an unpickler that can make built-in plain data and nothing else
  (`Unpacker`). What is not plain data stays in C: the test gets a `Handle`, which never equals or computes with plain data.
- A stdin program needs no T: C reads one memory file and writes another; the caller compares them once C is dead.

**Confinement.** Landlock (`restrict_files`): the standard library and the installed packages can be read, one scratch
folder can be written, nothing else opens. seccomp (`SYSCALLS`): a list of what is allowed; not in it are exec, sockets
(but socketpair), ptrace, mount, chmod, memfd, shared memory. For C also no fork (`restrict_candidate`), so a program is
one process and SIGKILL ends all of it. No capabilities, a bare environment, and limits on wall time, CPU time, memory,
size of a file, size of the folder, threads.

**Not covered.** Kernel exploits; stat() of any path; reading the installed packages; tests that can be met without
computing anything (`assert f(x)`, or two objects of the program's own class that it says are equal). Programs cannot
use subprocess or multiprocessing or make folders, and a test cannot mix objects of their classes and plain data in one
operator. Without Landlock (Linux < 5.13, gVisor) a program can read this user's files; on a machine without a table of
system calls it can do what this user can. Both are said once on stderr. Linux only.
"""

import ast
import builtins
import collections
import contextlib
import ctypes
import datetime
import decimal
import fractions
import functools
import gc
import importlib
import io
import json
import math
import operator
import os
import pickle
import platform
import re
import resource
import select
import signal
import socket
import struct
import sys
import sysconfig
import time
import types

if __name__ != "__main__":  # Only the caller needs these; threading would make every fork of the zygote slower.
    import atexit
    import queue
    import shutil
    import subprocess
    import tempfile
    import threading

MIB = 1 << 20
MESSAGE_LIMIT = 64 * MIB  # one result of a call
TESTER_MEMORY = 2048 * MIB
STACK = 512 * MIB  # for recursion through C code: sorted(key=...), lru_cache
TICK_S = 0.05  # how often the threads and files of a running program are counted
OPEN_FILES, SCRATCH_FILES = 64, 1000
PRELOADED = "array bisect cmath copy dataclasses enum heapq itertools random statistics string textwrap typing".split()


# ---- Messages: a length, then that many bytes; file descriptors travel with the length -------------------------------


def send(sock, payload, fds=()):
    header = struct.pack("=Q", len(payload))
    if fds:
        socket.send_fds(sock, [header], fds)
        sock.sendall(payload)
    else:
        sock.sendall(header + payload)


def receive(sock, max_fds=0, limit=None):
    """-> (payload, fds). EOFError when the other side is gone."""
    header, fds = read_exactly(sock, 8) if not max_fds else b"", []
    if max_fds:
        header, fds, _, _ = socket.recv_fds(sock, 8, max_fds)
        if len(header) < 8:
            raise EOFError
    (size,) = struct.unpack("=Q", header)
    if limit and size > limit:
        raise ValueError(f"result larger than {limit // MIB} MiB")
    return read_exactly(sock, size), fds


def read_exactly(sock, size):
    received = bytearray()  # grows by what has come, not by what the other side announced
    while len(received) < size:
        part = sock.recv(min(size - len(received), MIB))
        if not part:
            raise EOFError
        received += part
    return bytes(received)


# ---- Plain data. In both directions, `object(n)` in a pickle stands for object number n of the candidate -------------

# class: (how C takes a value of it apart, the types of argument from which T puts one together)
PLAIN = {
    int: (lambda value: (int.__int__(value),), {int}),
    float: (lambda value: (float.__float__(value),), {float}),
    str: (lambda value: (str.__str__(value),), {str}),
    bytes: (lambda value: (bytes(memoryview(value)),), {bytes}),
    list: (lambda value: (list(value),), {list}),
    tuple: (lambda value: (tuple(value),), {tuple}),
    dict: (lambda value: (dict(value),), {dict}),
    set: (lambda value: (set(value),), {set}),
    frozenset: (lambda value: (frozenset(value),), {frozenset}),
    complex: (lambda value: (value.real, value.imag), {float}),
    range: (lambda value: (value.start, value.stop, value.step), {int}),
    collections.deque: (lambda value: (list(value), value.maxlen), {list, int, type(None)}),
    decimal.Decimal: (lambda value: (str(value),), {str}),
    fractions.Fraction: (lambda value: (value.numerator, value.denominator), {int}),
    datetime.date: (lambda value: value.timetuple()[:3], {int}),
    datetime.datetime: (lambda value: (*value.timetuple()[:6], value.microsecond), {int}),
    datetime.time: (lambda value: (value.hour, value.minute, value.second, value.microsecond), {int}),
    datetime.timedelta: (lambda value: (value.days, value.seconds, value.microseconds), {int}),
}
BASES = (int, float, str, bytes, list, tuple, dict, set, frozenset)  # their subclasses travel as the base


class Kept:
    """The objects of C that T has handles to."""

    def __init__(self):
        self.objects, self.numbers = [], {}  # the list keeps them alive, so that ids stay unique

    def number(self, value):
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self.numbers[id(value)]


class CandidatePacker(pickle.Pickler):
    """C's answers. Nobody trusts them; this only keeps honest ones inside what `Unpacker` accepts."""

    def __init__(self, file, kept):
        super().__init__(file, 5)
        self.kept = kept

    def reducer_override(self, value):  # called for all but exact built-in scalars and containers
        kind = type(value)
        if value is object or (isinstance(value, type) and value in PLAIN):
            return NotImplemented  # the constructors below, by name
        if kind.__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
            value = value.tolist()
            kind = type(value)
        if kind is bool:  # of a numpy scalar
            return bool, (int(value),)
        base = kind if kind in PLAIN else next((base for base in BASES if isinstance(value, base)), None)
        if base:
            return base, PLAIN[base][0](value)
        return object, (self.kept.number(value),)


class CandidateUnpacker(pickle.Unpickler):
    """T's requests, as C reads them."""

    def __init__(self, file, kept):
        super().__init__(file)
        self.kept = kept

    def find_class(self, module, name):
        if (module, name) == ("builtins", "object"):
            return self.kept.objects.__getitem__
        return super().find_class(module, name)


class Constructor:
    """What a class name in C's answer becomes in T: it checks the types of its arguments, so nothing grows on the way, and
    refuses pickle's BUILD, with which an answer could set attributes (`Fraction.__eq__`, say) for good."""

    __slots__ = ("make", "types")

    def __init__(self, make, types):
        self.make, self.types = make, types

    def __call__(self, *args):
        if not {type(arg) for arg in args} <= self.types:
            raise pickle.UnpicklingError("argument of a wrong type")
        return self.make(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("attributes cannot be set")


CONSTRUCTORS = {(kind.__module__, kind.__name__): Constructor(kind, types) for kind, (_, types) in PLAIN.items()}
CONSTRUCTORS["builtins", "bool"] = Constructor(bool, {int})


class Unpacker(pickle.Unpickler):
    """C's answers, as T reads them: hostile. Names outside the table are refused."""

    def __init__(self, file, make_handle):
        super().__init__(file)
        self.make_handle = make_handle

    def find_class(self, module, name):
        if (module, name) == ("builtins", "object"):
            return Constructor(self.make_handle, {int})
        try:
            return CONSTRUCTORS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not plain data") from None


class TesterPacker(pickle.Pickler):
    """T's requests: ordinary pickles, a Handle as its number."""

    def reducer_override(self, value):
        return (object, (value._number,)) if type(value) is Handle else NotImplemented


# ---- C, the candidate. All of this runs inside the hostile process: it serves honest programs, it guards nothing ------


def run_script(source):
    """The program as `python program.py` would run it, to its exit status."""
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    status = 0
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if status == 1 and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException:
        status = 1
        sys.excepthook(*sys.exc_info())
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()  # waits for the threads that are not daemons
    importlib.import_module("atexit")._run_exitfuncs()
    try:
        sys.stdout.flush()
    except (ValueError, AttributeError):
        pass  # closed or replaced by the program, which is not an error
    except OSError:
        status = status or 120
    return status


def serve(source, channel):
    """The program as an imported module; then answers T's requests until T hangs up."""
    module = sys.modules["solution"] = sys.modules["__main__"] = types.ModuleType("solution")
    kept = Kept()

    def find(name):
        owner = vars(module).get("Solution")  # LeetCode's form
        if name not in vars(module) and hasattr(owner, name):
            return getattr(owner(), name)
        if name not in vars(module):
            raise NameError(f"name '{name}' is not defined")
        return vars(module)[name]

    requests = {"find": find, "call": lambda function, args, kwargs: function(*args, **kwargs), "getattr": getattr,
                "setattr": setattr, "getitem": operator.getitem, "len": len, "bool": bool, "str": str, "repr": repr,
                "iter": iter, "next": next, "eq": operator.eq}

    def answer(function, *args):
        buffer = io.BytesIO()
        try:
            CandidatePacker(buffer, kept).dump(("value", function(*args)))
        except BaseException as error:
            names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            buffer = io.BytesIO()
            CandidatePacker(buffer, kept).dump(("raise", names, type(error).__name__, str(error)[:500]))
        send(channel, buffer.getbuffer())

    def perform(payload):
        name, args = CandidateUnpacker(io.BytesIO(payload), kept).load()
        return requests[name](*args)

    def load():
        exec(compile(source, "solution.py", "exec", dont_inherit=True), module.__dict__)

    answer(load)
    with contextlib.suppress(EOFError, OSError):
        while True:
            answer(perform, receive(channel)[0])


# ---- T, the tester ---------------------------------------------------------------------------------------------------


class Gone(BaseException):
    """C does not answer any more. Not an Exception, so that a test's `except Exception` does not swallow it."""


class Program:
    """C, as T sees it."""

    def __init__(self, channel, timeout_s=None):
        channel.settimeout(timeout_s)
        self.channel, self.handles, self.gone = channel, {}, None

    def ask(self, request, *args):
        buffer = io.BytesIO()
        TesterPacker(buffer, 5).dump((request, args))
        try:
            send(self.channel, buffer.getbuffer())
        except OSError:
            self.gone = self.gone or "gone"
            raise Gone from None
        return self.answer(stop_allowed=request == "next")

    def answer(self, stop_allowed=False):
        try:
            payload, _ = receive(self.channel, limit=MESSAGE_LIMIT)
            kind, *values = Unpacker(io.BytesIO(payload), self.handle).load()
            if kind == "value":
                return values[0]
            names, name, message = values
            assert all(type(text) is str for text in (name, message, *names))
        except BaseException as error:
            closed = isinstance(error, (EOFError, OSError)) and not isinstance(error, TimeoutError)
            self.gone = "gone" if closed else "timeout" if isinstance(error, TimeoutError) else f"exception: {error!r}"
            raise Gone from None
        if stop_allowed and "StopIteration" in names:
            raise StopIteration
        raise self.exception(names, name, message)

    def handle(self, number):
        return self.handles.setdefault(number, Handle(self, number))

    @staticmethod
    def exception(names, name, message):
        """The built-in exception that C raised. SystemExit and the like could end the test, StopIteration a loop in it."""
        for kind in (getattr(builtins, name, None) for name in names):
            if isinstance(kind, type) and issubclass(kind, Exception) and kind is not StopIteration:
                with contextlib.suppress(TypeError):  # some need more than a message
                    error = kind(message)
                    break
        else:
            error = RuntimeError(message)
        error.reported = f"{name}: {message}" if message else name
        return error


class Handle:
    """In T: an object of C that is not plain data (a function, an instance, an iterator). Calls, attributes, items and
    iteration go to C. Two handles may be compared there; a handle never equals plain data and has no other operator."""

    __slots__ = ("_program", "_number")
    # `assert f(x).isdigit()` wants a str; an object of C would simply say yes
    WITHHELD = {name for kind in (str, bytes, float, set) for name in dir(kind) if re.match("is|.*with$", name)}

    def __init__(self, program, number):
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name):
        if name.startswith("__") or name in Handle.WITHHELD:  # numpy reads memory where `__array_interface__` says
            raise AttributeError(f"'{name}' of an object that is not plain data")
        return self._program.ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._program.ask("setattr", self, name, value)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("attributes cannot be set")

    def __call__(self, *args, **kwargs):
        return self._program.ask("call", self, args, kwargs)

    def __eq__(self, other):
        return type(other) is Handle and bool(self is other or self._program.ask("eq", self, other) is True)

    __hash__ = object.__hash__


for _name in ("getitem", "len", "bool", "str", "repr", "iter", "next"):
    setattr(Handle, f"__{_name}__", functools.partialmethod(
        lambda self, request, *args: self._program.ask(request, self, *args), _name))


class TestNamespace(dict):
    """The globals of a test. A name that is in neither the test nor the builtins is the candidate's."""

    def __init__(self, program):
        super().__init__(vars(builtins), __name__="tests")
        self.program = program

    def __missing__(self, name):
        if name in sys.stdlib_module_names and name not in self.entries:
            return importlib.import_module(name)  # `math.isclose` in a test is the true one
        try:
            return self.program.ask("find", name)
        except NameError:
            if hasattr(builtins, name):
                return getattr(builtins, name)
            raise


@functools.lru_cache(maxsize=64)  # the samples of a group share their tests
def compile_tests(source):
    """-> [(code of one top-level statement, whether it is an assert)]"""
    return [(compile(ast.Module([statement], []), "tests", "exec"), isinstance(statement, ast.Assert))
            for statement in ast.parse(source).body]


def run_asserts(program, job, verdict):
    statements = compile_tests(job["tests"])
    used = {name for code, _ in statements for name in code.co_names}
    namespace = TestNamespace(program)
    # Tests that use no name but builtins can only be about a builtin that the program redefines (MBPP 126: `sum`).
    namespace.entries = {job["entry_point"]} if job["entry_point"] else used if used <= vars(builtins).keys() else set()
    exec(job["setup"], namespace)
    for name in namespace.entries:
        namespace.pop(name, None)
    for code, is_assert in statements:
        try:
            exec(code, namespace)
            verdict["tests_passed"] += is_assert
        except Exception as error:
            verdict["reason"] = verdict["reason"] or explain(error)
            if not (is_assert and job["all_cases"]):
                return
    if not any(is_assert for _, is_assert in statements):
        verdict["tests_passed"] = 1


def run_calls(program, job, verdict):
    function = program.ask("find", job["fn_name"])
    for case in job["cases"]:
        try:
            ok = same_value(function(*call_arguments(case["input"])), from_json(case["output"]))
            reason = "wrong answer"
        except Exception as error:
            ok, reason = False, explain(error)
        verdict["tests_passed"] += ok
        if not ok:
            verdict["reason"] = verdict["reason"] or reason
            if not job["all_cases"]:
                return


def call_arguments(text):
    return [json.loads(line) for line in text.splitlines() if line.strip()] if isinstance(text, str) else text


def from_json(text):
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def same_value(got, expected):
    """Equality of plain data as JSON sees it: a tuple is a list; two floats may differ by rounding."""
    if isinstance(got, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(got) == len(expected) and all(map(same_value, got, expected))
    if isinstance(got, dict) and isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same_value(got[key], expected[key]) for key in got)
    if isinstance(got, float) and isinstance(expected, float):
        return got == expected or math.isclose(got, expected, rel_tol=1e-6, abs_tol=1e-6)
    return got == expected


def explain(error):
    reported = getattr(error, "reported", None)  # it was raised in C, not by the test
    if isinstance(error, AssertionError) and not reported:
        return "wrong answer"
    if isinstance(error, MemoryError):
        return "memory"
    return f"exception: {reported or type(error).__name__ + ': ' + str(error)}"


def judge(job, channel):
    verdict = {"passed": False, "reason": None, "tests_passed": 0, "tests_total": len(job["cases"]) or 1}
    program = Program(channel, job["case_timeout_s"])
    try:
        if not job["cases"]:
            statements = compile_tests(job["tests"])
            verdict["tests_total"] = sum(is_assert for _, is_assert in statements) or 1
            if not statements:
                verdict["reason"] = "no tests"
        program.answer()  # the program's own top level has run
        (run_calls if job["cases"] else run_asserts)(program, job, verdict)
    except BaseException as error:
        verdict["reason"] = verdict["reason"] or explain(error)
    if program.gone:  # whatever the test made of it
        verdict["reason"] = program.gone
    verdict["passed"] = not verdict["reason"] and verdict["tests_passed"] == verdict["tests_total"]
    return verdict


def tester(sock):
    resource.setrlimit(resource.RLIMIT_AS, (TESTER_MEMORY, TESTER_MEMORY))
    with contextlib.suppress(EOFError, OSError):
        while True:
            payload, fds = receive(sock, max_fds=1)
            with socket.socket(fileno=fds[0]) as channel:
                verdict = judge(pickle.loads(payload), channel)
                send(sock, json.dumps(verdict).encode())
            # the channel is closed: C, unless hostile, exits


# ---- Confinement -----------------------------------------------------------------------------------------------------

libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 15, 16, 22, 38

# What Python and its libraries need: name, number on x86_64, number on aarch64.
SYSCALLS = """
    read 0 63 | write 1 64 | readv 19 65 | writev 20 66 | pread64 17 67 | pwrite64 18 68 | preadv 295 69
    pwritev 296 70 | lseek 8 62 | close 3 57 | close_range 436 436 | fstat 5 80 | newfstatat 262 79 | stat 4 -
    lstat 6 - | statx 332 291 | statfs 137 43 | fstatfs 138 44 | access 21 - | faccessat 269 48
    faccessat2 439 439 | readlink 89 - | readlinkat 267 78 | getdents64 217 61 | getcwd 79 17 | chdir 80 49
    fchdir 81 50 | umask 95 166 | dup 32 23 | dup2 33 - | dup3 292 24 | pipe 22 - | pipe2 293 59 | fsync 74 82
    fdatasync 75 83 | ftruncate 77 46 | fallocate 285 47 | fadvise64 221 223 | sendfile 40 71
    copy_file_range 326 285 | openat 257 56 | unlink 87 - | unlinkat 263 35 | rename 82 - | renameat 264 38
    renameat2 316 276 | brk 12 214 | mmap 9 222 | munmap 11 215 | mremap 25 216 | mprotect 10 226 | madvise 28 233
    mincore 27 232 | msync 26 227 | clone 56 220 | exit 60 93 | exit_group 231 94 | futex 202 98
    set_robust_list 273 99 | rseq 334 293 | set_tid_address 218 96 | sched_yield 24 124 | sched_getaffinity 204 123
    gettid 186 178 | getcpu 309 168 | nanosleep 35 101 | clock_nanosleep 230 115 | clock_gettime 228 113
    clock_getres 229 114 | gettimeofday 96 169 | time 201 - | getitimer 36 102 | setitimer 38 103 | alarm 37 -
    times 100 153 | getrusage 98 165 | sysinfo 99 179 | uname 63 160 | rt_sigaction 13 134 | rt_sigprocmask 14 135
    rt_sigreturn 15 139 | rt_sigpending 127 136 | rt_sigtimedwait 128 137 | rt_sigsuspend 130 133
    sigaltstack 131 132 | pause 34 - | restart_syscall 219 128 | kill 62 129 | tgkill 234 131 | getpid 39 172
    getppid 110 173 | getuid 102 174 | geteuid 107 175 | getgid 104 176 | getegid 108 177 | getpgrp 111 -
    getpgid 121 155 | getsid 124 156 | getgroups 115 158 | getresuid 118 148 | getresgid 120 150
    getpriority 140 141 | prlimit64 302 261 | getrlimit 97 163 | setrlimit 160 164 | poll 7 - | ppoll 271 73
    select 23 - | pselect6 270 72 | epoll_create 213 - | epoll_create1 291 20 | epoll_ctl 233 21 | epoll_wait 232 -
    epoll_pwait 281 22 | eventfd2 290 19 | socketpair 53 199 | sendto 44 206 | recvfrom 45 207 | sendmsg 46 211
    recvmsg 47 212 | shutdown 48 210 | getsockopt 55 209 | setsockopt 54 208 | getsockname 51 204
    getpeername 52 205 | getrandom 318 278 | wait4 61 260 | waitid 247 95 | prctl 157 167 | ioctl 16 29 | fcntl 72 25
"""
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the table, AUDIT_ARCH_*
COLUMN, AUDIT_ARCH = MACHINES.get(platform.machine(), (None, None))
NUMBER = {}
if COLUMN is not None:
    for _entry in SYSCALLS.replace("\n", "|").split("|"):
        if _entry.strip() and _entry.split()[1 + COLUMN] != "-":
            NUMBER[_entry.split()[0]] = int(_entry.split()[1 + COLUMN])

CLONE_THREAD, ALL_BITS = 0x10000, 0xFFFFFFFF
TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX = 0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451
# Calls that are allowed with some arguments only: {name: [(index of the argument, mask, values allowed)]}
ARGUMENTS = {
    "prctl": [(0, ALL_BITS, {PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NAME, PR_GET_NAME})],
    "prlimit64": [(0, ALL_BITS, {0})],  # with a pid it would set the limits of the caller
    "socketpair": [(0, ALL_BITS, {socket.AF_UNIX}), (1, 0xF, {socket.SOCK_STREAM})],  # datagrams can be sent to any name
    "ioctl": [(1, ALL_BITS, {TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX})],
    # not F_SETOWN with F_SETSIG, which have the kernel send any signal to any process
    "fcntl": [(1, ALL_BITS, {0, 1, 2, 3, 4, 5, 6, 7, 1030, 1031, 1032, 1033, 1034})],
    # O_TRUNC truncates even what is opened to be read, and early Landlocks do not mind
    "openat": [(2, os.O_ACCMODE | os.O_TRUNC, {0, 1, 2, os.O_TRUNC | 1, os.O_TRUNC | 2})],
}
WITHOUT_LANDLOCK = {"openat": [(2, os.O_ACCMODE | os.O_CREAT | os.O_TRUNC, {os.O_RDONLY})]}  # nothing opens for writing
LANDLOCK_ONLY = {"unlink", "unlinkat", "rename", "renameat", "renameat2"}


def bpf_filter(arguments, others):
    """seccomp program: the calls in `arguments` if their arguments fit, else EPERM; then `others`."""
    load, jump_equal, jump_at_least, and_, ret = 0x20, 0x15, 0x35, 0x54, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000

    def op(code, value, if_true=0, if_false=0):
        return struct.pack("HBBI", code, if_true, if_false, value)

    program = [op(load, 4), op(jump_equal, AUDIT_ARCH, 1, 0), op(ret, kill), op(load, 0)]
    for name, conditions in arguments.items():
        block = []
        for index, mask, values in conditions:
            block += [op(load, 16 + 8 * index), op(and_, mask)]
            block += [op(jump_equal, value, len(values) - i) for i, value in enumerate(sorted(values))]
            block += [op(ret, error | 1)]  # EPERM
        block += [op(ret, allow)]
        program += [op(jump_equal, NUMBER[name], 0, len(block)), *block]
    if others == "allow":
        return b"".join([*program, op(ret, allow)])
    # ENOSYS for calls newer than Linux 5.2, so that libc falls back to older ones (clone3 to clone)
    return b"".join([*program, op(jump_at_least, 424, 0, 1), op(ret, error | 38), op(ret, error | 1)])


def apply_filter(program):
    class SockFprog(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_char_p)]

    return libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(SockFprog(len(program) // 8, program)), 0, 0) == 0


def restrict_files(folder, readable):
    """Landlock: from here on only these paths open, in this process and its children. -> whether the kernel does it."""
    create_ruleset, add_rule, restrict_self = 444, 445, 446  # the same numbers on all machines
    write_file, read_file, read_dir, remove_file, make_file, truncate = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8, 1 << 14
    abi = libc.syscall(create_ruleset, None, 0, 1)
    if abi < 1:
        return False
    known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1  # all rights over files that this kernel knows
    ruleset = libc.syscall(create_ruleset, struct.pack("Q", known), 8, 0)
    rules = dict.fromkeys(readable, read_file | read_dir)
    rules |= dict.fromkeys(("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"), read_file | write_file)
    rules[folder] = read_file | read_dir | write_file | truncate | make_file | remove_file  # no folders, no links
    for path, rights in rules.items():
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_PATH)
            rights &= known if os.path.isdir(path) else known & ~(read_dir | remove_file | make_file)
            if libc.syscall(add_rule, ruleset, 1, struct.pack("=Qi", rights, fd), 0):
                return False
            os.close(fd)
    done = libc.syscall(restrict_self, ruleset, 0) == 0
    os.close(ruleset)
    return done


def confine(folder, readable, without):
    """Confines the zygote, and so all that it forks. -> the names of the protections that are missing."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("800")  # short of memory, the kernel ends the sandbox before the training
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # no process of this user may trace the zygote or read its memory
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))  # root keeps no capability
    landlock = "Landlock" not in without and restrict_files(folder, readable)
    arguments = {name: [] for name in NUMBER if landlock or name not in LANDLOCK_ONLY}
    arguments |= ARGUMENTS if landlock else ARGUMENTS | WITHOUT_LANDLOCK
    seccomp = "seccomp" not in without and COLUMN is not None and apply_filter(bpf_filter(arguments, "refuse"))
    return ([] if landlock else ["Landlock"]) + ([] if seccomp else ["seccomp"])


def restrict_candidate(limits, seccomp):
    """What C gives up beyond the zygote's confinement, before a byte of the program is compiled."""
    cpu = math.ceil(limits["cpu_s"])
    for name, soft, hard in (("AS", limits["memory_mb"] * MIB, limits["memory_mb"] * MIB), ("CPU", cpu, cpu + 1),
                             ("FSIZE", limits["file_mb"] * MIB, limits["file_mb"] * MIB),
                             ("NOFILE", OPEN_FILES, OPEN_FILES)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard))
    only_self = [(0, ALL_BITS, {os.getpid()})]
    return not seccomp or apply_filter(bpf_filter({
        "clone": [(0, CLONE_THREAD, {CLONE_THREAD})], "kill": only_self, "tgkill": only_self,
        "prctl": [(0, ALL_BITS, {PR_SET_NAME, PR_GET_NAME})]}, "allow"))


# ---- Z, the zygote ---------------------------------------------------------------------------------------------------


def die_with(parent):
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def candidate(request, fds, lifeline, folder, zygote, seccomp):
    """Runs in the fork; never returns."""
    try:
        die_with(zygote)
        source = b""
        while part := os.pread(fds[0], MIB, len(source)):
            source += part
        # received descriptors are the lowest free ones in ascending order, so none is overwritten before its turn
        for fd, place in zip(fds[1:], (3,) if len(fds) == 2 else (0, 1, 2)):
            os.dup2(fd, place, inheritable=False)
        os.dup2(lifeline, 4)
        os.closerange(5, 256)
        if len(fds) > 2:
            os.closerange(3, 4)
        os.chdir(folder)
        if not restrict_candidate(request, seccomp):
            os._exit(1)
        if len(fds) > 2:
            os._exit(run_script(source) & 0xFF)
        serve(source, socket.socket(fileno=3))
        os._exit(0)
    except BaseException:
        os._exit(1)


def supervise(pid, lifeline, control, limits, folder):
    """Waits for the end of C or puts an end to it. -> what became of it."""
    start = time.monotonic()
    deadline = start + limits["timeout_s"]
    poll = select.poll()
    poll.register(lifeline, 0)  # its other end is open in C alone
    poll.register(control, select.POLLIN)
    why = None
    while not why:
        if poll.poll(1000 * max(0.0, min(TICK_S, deadline - time.monotonic()))):
            break  # C has ended, or the caller has, or wants no more
        if time.monotonic() >= deadline:
            why = "timeout"
        elif os.stat(f"/proc/{pid}/task").st_nlink - 2 > limits["threads"]:  # links: one per thread, `.` and `..`
            why = "threads"
        elif folder_size(folder) > limits["disk_mb"] * MIB:
            why = "disk"
    os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    if usage.ru_utime + usage.ru_stime >= math.ceil(limits["cpu_s"]):
        why = why or "timeout"
    return {"why": why, "status": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - start}


def folder_size(folder):
    with os.scandir(folder) as entries:
        sizes = [entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries]
    return sum(sizes) if len(sizes) <= SCRATCH_FILES else math.inf


def zygote(config):
    limit = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK if limit[1] == resource.RLIM_INFINITY else min(STACK, limit[1])
    if limit[0] != wanted:  # the stack's room is laid out when a program starts, so start again
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, limit[1]))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    control, tests = (socket.socket(fileno=fd) for fd in config["fds"])
    sys.path += config["packages"]
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("_thread").stack_size(8 * MIB)
    if config["core"] is not None:
        os.sched_setaffinity(0, {config["core"]})
    missing = confine(config["folder"], config["readable"], config["without"])
    me = os.getpid()
    tester_pid = os.fork()
    if not tester_pid:
        control.close()
        die_with(me)
        tester(tests)
        os._exit(0)
    tests.close()
    os.dup2(0, 2)  # stderr was for a failure to start; now it is /dev/null
    send(control, json.dumps(missing).encode())
    gc.collect()
    gc.freeze()  # a collection in C does not touch, and so copy, the zygote's pages
    with contextlib.suppress(EOFError, OSError):
        while True:
            payload, fds = receive(control, max_fds=4)
            request = json.loads(payload)
            ends, lifeline = os.pipe()
            pid = os.fork()
            if not pid:
                candidate(request, fds, lifeline, config["folder"], me, "seccomp" not in missing)
            for fd in (lifeline, *fds):
                os.close(fd)
            report = supervise(pid, ends, control, request, config["folder"])
            os.close(ends)
            for name in os.listdir(config["folder"]):
                os.unlink(os.path.join(config["folder"], name))
            send(control, json.dumps(report).encode())
    os.kill(tester_pid, signal.SIGKILL)
    os.waitpid(tester_pid, 0)
    os._exit(0)


# ---- The caller ------------------------------------------------------------------------------------------------------

SYSTEM_LIBRARIES = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo",
                    "/etc/ld.so.cache", "/etc/localtime"]
START_TIMEOUT_S, GRACE_S = 120, 5
WITHOUT = []  # protections to do without, for tests: "Landlock", "seccomp"


class Worker:
    """A zygote with its tester. Used by one thread at a time."""

    live, idle, warned = set(), [], False

    def __init__(self):
        packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        libraries = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), f"{sys.base_prefix}/lib"]
        self.owner, self.folder = os.getpid(), tempfile.mkdtemp(prefix="sandbox-")
        self.control, zygote_end = socket.socketpair()
        self.tests, tester_end = socket.socketpair()
        config = {"fds": [zygote_end.fileno(), tester_end.fileno()], "folder": self.folder, "packages": packages,
                  "readable": SYSTEM_LIBRARIES + libraries + packages, "without": WITHOUT, "core": None}
        environment = {"HOME": self.folder, "TMPDIR": self.folder, "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1",
                       "OPENBLAS_NUM_THREADS": "1", "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
        self.process, self.stopped = None, False
        Worker.live.add(self)
        try:
            with zygote_end, tester_end:
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-X", "utf8", os.path.abspath(__file__), json.dumps(config)],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/",
                    env=environment, pass_fds=config["fds"], start_new_session=True)  # Ctrl-C is the caller's
            self.control.settimeout(START_TIMEOUT_S)
            missing = json.loads(receive(self.control)[0])
        except BaseException as error:
            said = self.process.stderr.read().decode(errors="replace").strip() if isinstance(error, EOFError) else ""
            self.close()
            raise RuntimeError(f"the sandbox does not start: {said or error!r}") from error
        if missing and not Worker.warned:
            Worker.warned = True
            print(f"sandbox: no {' and no '.join(missing)} here; see 'Not covered' in sandbox.py. Use a container.",
                  file=sys.stderr, flush=True)

    def usable(self):
        return self.owner == os.getpid() and not self.stopped and self.process.poll() is None

    def stop(self):
        """Ends the worker from another thread: whoever waits for it gets an EOFError."""
        self.stopped = True
        for sock in (self.control, self.tests):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        if self.owner != os.getpid():
            return  # a forked copy of the caller
        self.stop()
        self.control.close()
        self.tests.close()
        if self.process:
            try:
                self.process.wait(1)  # the zygote kills its children, waits for them and ends
            except subprocess.TimeoutExpired:
                self.process.kill()  # which the kernel passes on to them
                self.process.wait()
            self.process.stderr.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        Worker.live.discard(self)

    def run(self, program, limits):
        """-> result. Raises EOFError or OSError when the worker has died; close it then."""
        start = time.monotonic()
        with memory_file(program["code"]) as code:
            run = self.run_scripts if program["cases"] and not program["fn_name"] else self.run_judged
            passed, total, reason = run(code, program, limits)
        return {"passed": reason is None, "reason": reason or "passed", "seconds": time.monotonic() - start,
                "tests_passed": passed, "tests_total": total}

    def start(self, limits, files):
        send(self.control, json.dumps(limits).encode(), [file.fileno() for file in files])

    def report(self, limits):
        self.control.settimeout(limits["timeout_s"] + GRACE_S)
        return json.loads(receive(self.control)[0])

    def run_scripts(self, code, program, limits):
        """stdin programs: one run per case."""
        passed, reason = 0, None
        for case in program["cases"]:
            with memory_file(case["input"]) as stdin, memory_file() as stdout, memory_file() as stderr:
                self.start(limits, [code, stdin, stdout, stderr])
                report = self.report(limits)
                failure = script_failure(report, stdout, stderr, limits)
                if not failure and not same_output(contents(stdout), case["output"]):
                    failure = "wrong answer"
            passed += not failure
            reason = reason or failure
            if failure and not program["all_cases"]:
                break
        return passed, len(program["cases"]), reason

    def run_judged(self, code, program, limits):
        """Asserts and calls: C and T talk to each other; the caller waits for C's end and for T's verdict."""
        calls = len(program["cases"])
        job = {**program, "code": None, "case_timeout_s": limits["timeout_s"] if calls else None}
        limits = {**limits, "timeout_s": limits["timeout_s"] * (calls + 1), "cpu_s": limits["cpu_s"] * (calls + 1)}
        for_tester, for_candidate = socket.socketpair()
        with for_candidate:
            with for_tester:
                send(self.tests, pickle.dumps(job), [for_tester.fileno()])
            self.start(limits, [code, for_candidate])
        report = self.report(limits)
        self.tests.settimeout(GRACE_S)
        verdict = json.loads(receive(self.tests)[0])
        if verdict["passed"]:
            return verdict["tests_passed"], verdict["tests_total"], None
        reason = verdict["reason"]
        if reason == "gone":
            reason = died(report)
        return verdict["tests_passed"], verdict["tests_total"], report["why"] or printable(reason)


@contextlib.contextmanager
def memory_file(text=""):
    with open(os.memfd_create("sandbox"), "w+b") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        file.seek(0)
        yield file


def contents(file):
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0)


def script_failure(report, stdout, stderr, limits):
    """Why a stdin program failed whatever it printed, or None."""
    if report["why"]:
        return report["why"]
    if os.fstat(stdout.fileno()).st_size >= limits["file_mb"] * MIB:
        return "output limit"
    if not report["status"]:
        return None
    size = os.fstat(stderr.fileno()).st_size
    lines = os.pread(stderr.fileno(), 4096, max(0, size - 4096)).decode(errors="replace").strip().splitlines()
    if report["status"] < 0 or not lines:
        return died(report)
    return "memory" if lines[-1].startswith("MemoryError") else printable(f"exception: {lines[-1]}")


def died(report):
    status = report["status"]
    if status == -signal.SIGXCPU:
        return "timeout"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exited early with status {status}"


def printable(text):
    return "".join(letter if letter.isprintable() else " " for letter in text[:300])


FLOAT = re.compile(rb"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?")


def same_output(output, expected):
    """Compares token by token. Two floats may differ by 1e-6, absolute or relative; all else is text."""
    want = expected.encode("utf-8", "surrogatepass").split()
    got = output.split(None, len(want))  # no more pieces than that, however much was printed
    return len(got) == len(want) and all(map(same_token, got, want))


def same_token(got, want):
    if got == want:
        return True
    if not (FLOAT.fullmatch(got) and FLOAT.fullmatch(want)):
        return False
    return math.isclose(float(got), float(want), rel_tol=1e-6, abs_tol=1e-6)


PROGRAM = {"code": None, "tests": "", "setup": "", "entry_point": None, "cases": [], "fn_name": None, "all_cases": False,
           "timeout_s": None}


def run_tests(programs, timeout_s=6.0, memory_mb=1024, workers=None, *, cpu_s=None, file_mb=16, disk_mb=64, threads=64,
              on_result=None):
    """Runs every program against its tests; -> [{"passed", "reason", "seconds", "tests_passed", "tests_total"}].

    A program is a dict with "code" and one of
      "tests": source that asserts about names of the code; optional "setup" (trusted source that runs before, and whose
          names win over the code's) and "entry_point" (the name under test, which wins over the setup's);
      "cases": [{"input": text, "output": text}]: each is a run of the code as a script;
      "cases" and "fn_name": calls of a function or a method of `class Solution`; an input is a list of arguments or a text
          with one JSON value per line, an output is a value or JSON text.
    Optional: "timeout_s" of its own; "all_cases": do not stop at the first failure. Other keys are ignored.

    timeout_s, cpu_s (default: as timeout_s, rounded up): of one run: the whole of "tests", or one case.
    memory_mb: address space. file_mb: of one file, and of the output. disk_mb: of the folder. threads: of one program.
    workers: default one per core. on_result(index, result) is called in the caller's thread as results come.
    reason: "passed", "wrong answer", "timeout", "memory", "threads", "disk", "output limit", "exception: ...",
    "exited early ...", "killed by ...", "no tests", "worker died ...". Equal programs run once.
    RuntimeError when the sandbox cannot start. May be called from any thread; the workers stay for the next call.
    """
    jobs, places = collections.deque(), {}
    for index, program in enumerate(programs):
        if not isinstance(program.get("code"), str) or not ("tests" in program or "cases" in program):
            raise ValueError(f"program {index} needs 'code' and 'tests' or 'cases'")
        program = PROGRAM | {key: program[key] for key in PROGRAM if program.get(key) is not None}
        key = json.dumps(program, sort_keys=True, default=repr)
        if key not in places:
            own_s = program["timeout_s"] or timeout_s
            jobs.append((key, program, {"timeout_s": own_s, "cpu_s": cpu_s or own_s, "memory_mb": memory_mb,
                                        "file_mb": file_mb, "disk_mb": disk_mb, "threads": threads}))
        places.setdefault(key, []).append(index)
    results, finished, busy, stopped = [None] * len(programs), queue.Queue(), set(), threading.Event()
    count = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    pool = [threading.Thread(target=work, args=(jobs, finished, busy, stopped), daemon=True) for _ in range(count)]
    try:
        for thread in pool:
            thread.start()
        for _ in places:
            key, result = finished.get()
            if isinstance(result, BaseException):
                raise result
            for index in places[key]:
                results[index] = dict(result)
                if on_result:
                    on_result(index, results[index])
    except BaseException:  # Ctrl-C too
        stopped.set()
        for worker in list(busy):
            worker.stop()
        raise
    finally:
        for thread in pool:
            thread.join()
    return results


def work(jobs, finished, busy, stopped):
    """One thread of run_tests: takes jobs until there are none."""
    worker = None
    try:
        while jobs and not stopped.is_set():
            with contextlib.suppress(IndexError):  # another thread took the last one
                key, program, limits = jobs.popleft()
                worker = worker or take_worker()
                busy.add(worker)
                try:
                    result = worker.run(program, limits)
                except Exception as error:
                    busy.discard(worker)
                    worker.close()
                    worker = None
                    # a tester that does not come back is in a comparison that the program's answer made endless
                    reason = "timeout" if isinstance(error, TimeoutError) else f"worker died: {error!r}"
                    result = {"passed": False, "reason": reason, "seconds": limits["timeout_s"], "tests_passed": 0,
                              "tests_total": len(program["cases"]) or 1}
                finished.put((key, result))
    except BaseException as error:
        finished.put((None, error))
    finally:
        if worker:
            busy.discard(worker)
            if stopped.is_set():
                worker.close()
            else:
                Worker.idle.append(worker)


def take_worker():
    while Worker.idle:
        with contextlib.suppress(IndexError):
            worker = Worker.idle.pop()
            if worker.usable():
                return worker
            worker.close()
    return Worker()


def close_workers():
    """Ends the workers that wait for the next call of run_tests; called at exit."""
    for worker in list(Worker.live):
        worker.close()


if __name__ == "__main__":
    zygote(json.loads(sys.argv[1]))
else:
    atexit.register(close_workers)
