"""Runs model-written Python against its tests and says, unforgeably, which programs pass.

    from sandbox import run_tests
    run_tests([{"code": "def add(a, b): return a + b", "tests": "assert add(1, 2) == 3"}])
    -> [{"passed": True, "reason": "passed", "seconds": 0.004, "tests_passed": 1, "tests_total": 1}]

**Threat model.** A policy trained on this reward finds whatever makes the verdict say "passed", and a base
model writes `os.remove`, `while True` and fork bombs without meaning to. So the program is hostile; the tests
and the owner of the machine are not. What a process prints, returns or exits with after success, a program
inside that process can print, return or exit with too: program and test never share a process.

**Processes**, for each worker (a worker is one thread of the caller):

    caller --- code, limits ---> Z  zygote: a fresh `python -I -S`, confined; forks per program
      |                          |- C  candidate: a fork of Z that runs one program and dies
      '--- tests / verdict ----- '- T  tester: a fork of Z that runs trusted tests, job after job
                              C <---> T  calls and their results, as plain data

Z ends when its caller is gone, however that died, and takes C and T along; the shell that has started Z then
removes the worker's folder.

- C holds stdin, stdout, stderr, a socket to T and a pipe that tells Z of its end. No test is in its memory
  (it is a copy of Z, which reads neither code nor tests) nor in a file that it can open, and it can neither
  trace nor signal another process. All it can do is to answer T's calls, rightly or wrongly.
- T executes the tests. A name that a test does not define is asked from C. Arguments and results travel as
  JSON that can only become built-in plain data (`PLAIN`): there is no pickle anywhere. What is not plain data
  stays in C: the test gets a `Handle`, which never equals or computes with plain data.
- A stdin program needs no T: C reads one memory file and writes another; the caller compares when C is dead.

**Confinement.** Landlock (`restrict_files`): the standard library and installed packages can be read, one
scratch folder can be written, nothing else opens. seccomp (`SYSCALLS`): a list of what is allowed; not in it
are exec, ptrace, mount, chmod, memfd, shared memory and all sockets but a pair. For C also no fork
(`candidate_filter`): a program is one process and SIGKILL ends all of it. No capabilities, hardly any
environment, and limits on time, memory, files, output and threads.

**Not covered.** Kernel exploits; stat() of any path; reading the installed packages; tests that can be met
without computing anything (`assert f(x)`, or two objects of the program's own class that it says are equal).
Programs cannot use subprocess or multiprocessing or make folders; a test cannot mix their objects and plain
data in one operator. Without Landlock (Linux < 5.13, gVisor) a program cannot write files, but can read what
this user can, the caller's memory with the tests included; on a machine without a column in `SYSCALLS` it can
do most of what this user can. Both are said once, on stderr: use a container then. Linux only.
"""

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
import json
import math
import operator
import os
import re
import resource
import select
import signal
import socket
import struct
import sys
import time
import types

if "zygote" not in sys._xoptions:  # only the caller needs these; threading would make each fork of Z slower
    import atexit
    import queue
    import shutil
    import subprocess
    import tempfile
    import threading

    CHOOSING = threading.Lock()

MIB = 1 << 20
LIMITS = ("timeout_s", "memory_mb", "file_mb", "disk_mb", "threads")  # what Z is told, in this order
RESULT_LIMIT, TESTER_MEMORY = 16 * MIB, 2048 * MIB  # of one result as JSON; of T's address space
TICK_S = 0.05  # how often the threads, files and CPU time of a running program are looked at
OPEN_FILES, SCRATCH_FILES = 64, 1000
START_TIMEOUT_S, GRACE_S = 120, 20  # until a worker must be ready; until one must answer after a timeout
PRELOADED = "array bisect copy enum heapq itertools random string typing"  # each makes the fork dearer, too


# ---- Messages: a length, then JSON of that length. File descriptors travel with the length. --------------


def send(sock, value, fds=()):
    payload = json.dumps(value).encode()
    message = len(payload).to_bytes(8, "little") + payload
    sent = socket.send_fds(sock, [message], fds) if fds else 0
    sock.sendall(message[sent:])


def receive(sock, max_fds=0, limit=None):
    """-> (value, fds). EOFError when the other side is gone. Both sides wait for an answer before they send
    again, so what is read at once belongs to one message."""
    message, fds, *_ = socket.recv_fds(sock, 4096, max_fds) if max_fds else (sock.recv(4096), [])
    if len(message) < 8:
        raise EOFError
    size = int.from_bytes(message[:8], "little")
    if limit and size > limit:
        raise ValueError("result too large")
    payload = bytearray(message[8:])  # grows by what has come, not by what the other side announced
    while len(payload) < size:
        part = sock.recv(min(size - len(payload), MIB))
        if not part:
            raise EOFError
        payload += part
    return json.loads(payload.decode()), fds


# ---- Plain data as JSON: None, bool, int, float, str as they are, the rest as [name of the class, part, ..

PLAIN = {  # class: (value, also of a subclass, -> parts; parts -> value)
    int: (lambda value: [hex(value)], lambda text: int(text, 16)),  # if too long for JSON, or of a subclass
    float: (lambda value: [float.__float__(value)], float),
    str: (lambda value: [str.__str__(value)], str),
    bytes: (lambda value: [value.decode("latin-1")], lambda text: text.encode("latin-1")),
    list: (list, lambda *parts: list(parts)),
    tuple: (list, lambda *parts: parts),
    set: (list, lambda *parts: set(parts)),
    frozenset: (list, lambda *parts: frozenset(parts)),
    dict: (lambda value: [part for item in value.items() for part in item],
           lambda *parts: dict(zip(parts[::2], parts[1::2]))),
    collections.deque: (list, lambda *parts: collections.deque(parts)),
    complex: (lambda value: [value.real, value.imag], complex),
    range: (lambda value: [value.start, value.stop, value.step], range),
    decimal.Decimal: (lambda value: [str(value)], decimal.Decimal),
    fractions.Fraction: (lambda value: [value.numerator, value.denominator],
                         lambda *parts: fractions.Fraction(*map(operator.index, parts))),  # not "1e999999999"
    datetime.date: (lambda value: value.timetuple()[:3], datetime.date),
    datetime.datetime: (lambda value: [*value.timetuple()[:6], value.microsecond], datetime.datetime),
    datetime.time: (lambda value: [value.hour, value.minute, value.second, value.microsecond], datetime.time),
    datetime.timedelta: (lambda value: [value.days, value.seconds, value.microseconds], datetime.timedelta),
}
CLASSES = {kind.__name__: kind for kind in PLAIN}
SCALARS = {type(None), bool, int, float, str}
BASES = (int, float, str, bytes, list, tuple, set, frozenset, dict)  # a value of a subclass travels as these


def fits_json(value):
    return type(value) in SCALARS and (type(value) is not int or value.bit_length() < 10_000)


def pack(value, number_of):
    """`number_of` gives the number of an object of C that is not plain data."""
    kind = type(value)
    if fits_json(value):
        return value
    if kind.__module__ == "numpy" and hasattr(value, "tolist"):
        return pack(value.tolist(), number_of)
    if kind not in PLAIN:
        kind = next((base for base in BASES if isinstance(value, base)), None)
    if kind is None:
        return ["object", number_of(value)]
    parts = PLAIN[kind][0](value)
    if not all(map(fits_json, parts)):
        parts = [pack(part, number_of) for part in parts]
    return [kind.__name__, *parts]


def unpack(value, object_of):
    """What `pack`, or an attacker, has written. The result is made of `PLAIN` and of `object_of(number)`."""
    if type(value) is not list:
        return value
    name, *parts = value
    if name == "object":
        return object_of(*parts)
    if list in set(map(type, parts)):
        parts = [unpack(part, object_of) for part in parts]
    return PLAIN[CLASSES[name]][1](*parts)


# ---- C, the candidate. This runs inside the hostile process: it serves honest programs, it guards nothing. -


def run_script(source):
    """The program as `python program.py` would run it. -> exit status"""
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    status = 0
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit as stop:
        status = stop.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        status = 1
        sys.excepthook(*sys.exc_info())
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()  # waits for the threads that are not daemons
    importlib.import_module("atexit")._run_exitfuncs()
    with contextlib.suppress(ValueError, AttributeError):  # stdout closed or replaced by the program
        sys.stdout.flush()
    return status


def serve(source, channel):
    """The program as an imported module, which answers T's requests until T hangs up."""
    module = sys.modules["solution"] = sys.modules["__main__"] = types.ModuleType("solution")
    kept, numbers = [], {}  # what T has handles to; its number by id

    def number_of(value):
        if id(value) not in numbers:
            numbers[id(value)] = len(kept)
            kept.append(value)
        return numbers[id(value)]

    def find(name):
        names = vars(module)
        if name not in names and hasattr(names.get("Solution"), name):  # LeetCode's form
            return getattr(names["Solution"](), name)
        if name not in names:
            raise NameError(f"name '{name}' is not defined")
        return names[name]

    def load():
        exec(compile(source, "solution.py", "exec", dont_inherit=True), module.__dict__)

    while True:
        (request, args), _ = receive(channel)
        try:
            function = REQUESTS.get(request) or {"load": load, "find": find}[request]
            send(channel, ["value", pack(function(*unpack(args, kept.__getitem__)), number_of)])
        except BaseException as error:
            names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            send(channel, ["raise", names, type(error).__name__, str(error)[:500]])


REQUESTS = {"call": lambda function, args, named: function(*args, **named), "getattr": getattr,
            "setattr": setattr, "getitem": operator.getitem, "len": len, "bool": bool, "str": str,
            "repr": repr, "iter": iter, "next": next, "eq": operator.eq}


# ---- T, the tester ---------------------------------------------------------------------------------------


class Gone(BaseException):
    """C does not answer any more. Not an Exception, so that no `except Exception` in a test swallows it."""


class Program:
    """C, as T sees it."""

    def __init__(self, channel, timeout_s):
        channel.settimeout(timeout_s)
        self.channel, self.handles, self.gone = channel, {}, None

    def handle(self, number):
        return self.handles.setdefault(number, Handle(self, number))

    def ask(self, request, *args):
        message = [request, pack(args, handle_number)]
        try:
            send(self.channel, message)
            (kind, *values), _ = receive(self.channel, limit=RESULT_LIMIT)
            if kind == "value":
                return unpack(values[0], self.handle)
            error = builtin_exception(*values)
        except BaseException as problem:
            if isinstance(problem, (EOFError, ConnectionError)):
                self.gone = "gone"
            else:
                self.gone = "timeout" if isinstance(problem, TimeoutError) else f"exception: {problem!r}"
            raise Gone from None
        if isinstance(error, StopIteration) and request != "next":  # it could end a loop in the test
            error = RuntimeError("StopIteration")
        raise error


def builtin_exception(names, name, text):
    """An exception of C, as the first of its classes that is a built-in Exception. SystemExit is none."""
    error = RuntimeError(text)
    for kind in (getattr(builtins, name, None) for name in names):
        if isinstance(kind, type) and issubclass(kind, Exception):
            with contextlib.suppress(TypeError):  # some want more than a text
                error = kind(text)
                break
    error.reported = f"{name}: {text}" if text else f"{name}"
    return error


class Handle:
    """In T: an object of C that is not plain data (a function, an instance, an iterator). Calls, attributes,
    items and iteration go to C. Two handles are compared there; a handle never equals plain data and has no
    other operator."""

    __slots__ = ("_program", "_number")
    # `assert f(x).isdigit()` wants a str; an object of C would just say yes
    WITHHELD = {name for kind in (str, float, set) for name in dir(kind) if re.match("is|.*with$", name)}

    def __init__(self, program, number):
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name):
        if name.startswith("__") or name in Handle.WITHHELD:  # `__array_interface__` is an address for numpy
            raise AttributeError(f"'{name}' of an object that is not plain data")
        return self._program.ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._program.ask("setattr", self, name, value)

    def __call__(self, *args, **named):
        return self._program.ask("call", self, args, named)

    def __eq__(self, other):
        return type(other) is Handle and (self is other or self._program.ask("eq", self, other) is True)

    __hash__ = object.__hash__


for _name in ("getitem", "len", "bool", "str", "repr", "iter", "next"):
    setattr(Handle, f"__{_name}__", lambda self, *args, _name=_name: self._program.ask(_name, self, *args))


def handle_number(value):
    if type(value) is not Handle:
        raise TypeError(f"a test cannot pass a {type(value).__name__} to the program")
    return value._number


class TestNamespace(dict):
    """The globals of a test. A name that neither the test nor Python defines is the candidate's."""

    def __init__(self, program, called):
        super().__init__(vars(builtins), __name__="tests")
        self.program, self.called = program, called

    def __missing__(self, name):
        if name in sys.stdlib_module_names and name not in self.called:
            return importlib.import_module(name)  # `math.isclose` in a test is the true one
        try:
            return self.program.ask("find", name)
        except NameError:
            if hasattr(builtins, name):
                return getattr(builtins, name)
            raise


@functools.lru_cache(maxsize=64)  # the samples of a group share their tests
def compile_tests(source):
    """-> (code, numbers of the lines that begin with `assert`, names that are called)"""
    lines = enumerate(source.split("\n"), 1)
    asserts = [number for number, line in lines if line.startswith("assert") and re.match(r"assert\b", line)]
    called = set(re.findall(r"(?<![\w.])(\w+) *\(", source))
    return compile(source, "tests", "exec", dont_inherit=True), asserts, called


def run_asserts(program, job):
    """Yields None for each line that asserts, or once if none does, and why the test has failed if it has."""
    code, asserts, called = compile_tests(job["tests"])
    under_test = {job["entry_point"]} - {None}
    namespace = TestNamespace(program, called | under_test)
    exec(compile_tests(job["setup"])[0], namespace)
    if vars(builtins).keys() >= set(code.co_names):  # the test is about a redefined builtin: MBPP 126's `sum`
        under_test.update(code.co_names)
    for name in under_test:
        namespace.pop(name, None)
    try:
        exec(code, namespace)
        yield from [None] * (len(asserts) or 1) if job["tests"].strip() else ["no tests"]
    except Exception as error:
        frame = error.__traceback__.tb_next  # of the test's top level
        yield from [None for line in asserts if frame and line < frame.tb_lineno]
        yield explain(error)


def run_calls(program, job):
    """Yields for each case None or why it failed."""
    function = program.ask("find", job["fn_name"])
    for case in job["cases"]:
        args = case["input"]
        if isinstance(args, str):
            args = [json.loads(line) for line in args.splitlines() if line.strip()]
        try:
            yield None if same_value(function(*args), from_json(case["output"])) else "wrong answer"
        except Exception as error:
            yield explain(error)


def from_json(text):
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def same_value(got, expected):
    """Equality of plain data as JSON has it: a tuple is a list; two floats may differ by rounding."""
    if isinstance(got, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(got) == len(expected) and all(map(same_value, got, expected))
    if isinstance(got, dict) and isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same_value(got[key], expected[key]) for key in got)
    if isinstance(got, float) and isinstance(expected, float):
        return math.isclose(got, expected, rel_tol=1e-6, abs_tol=1e-6)
    return got == expected


def explain(error):
    reported = getattr(error, "reported", None)  # raised in C, not by the test
    if isinstance(error, AssertionError) and not reported:
        return "wrong answer"
    if isinstance(error, MemoryError):
        return "memory"
    return f"exception: {reported or f'{type(error).__name__}: {error}'}"


def judge(job, channel):
    """-> [tests passed, tests in all, why it failed or None]"""
    passed, total, reason = 0, len(job["cases"]), None
    program = Program(channel, job["call_timeout_s"])
    try:
        total = total or len(compile_tests(job["tests"])[1]) or 1
        program.ask("load")
        for failure in (run_calls if job["cases"] else run_asserts)(program, job):
            passed += not failure
            reason = reason or failure
            if failure and not job["all_cases"]:
                break
    except BaseException as error:
        reason = reason or explain(error)
    return [passed, total, program.gone or reason]  # a C that is gone has failed, whatever the test thinks


def tester(sock):
    resource.setrlimit(resource.RLIMIT_AS, (TESTER_MEMORY, TESTER_MEMORY))
    with contextlib.suppress(EOFError, OSError):
        while True:
            job, fds = receive(sock, max_fds=1)
            with socket.socket(fileno=fds[0]) as channel:
                send(sock, judge(unpack(job, None), channel))
            # Now that the channel is closed, C exits.


# ---- Confinement -----------------------------------------------------------------------------------------

libc = ctypes.CDLL(None)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME, PR_GET_NAME = 1, 4, 15, 16
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
CLONE_THREAD, ALL_BITS, O_TRUNC = 0x10000, 0xFFFFFFFF, os.O_TRUNC
TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX = 0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451

# What Python and its libraries need: the name, the number on x86_64, the number on aarch64.
SYSCALLS = """
    read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, lseek 8 62, close 3 57,
    close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, openat 257 56,
    fstat 5 80, newfstatat 262 79, stat 4 -, lstat 6 -, statx 332 291, access 21 -, faccessat 269 48,
    readlink 89 -, readlinkat 267 78, getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50,
    umask 95 166, fsync 74 82, fdatasync 75 83, ftruncate 77 46, fallocate 285 47, unlink 87 -,
    unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, brk 12 214, mmap 9 222, munmap 11 215,
    mremap 25 216, mprotect 10 226, madvise 28 233, msync 26 227, clone 56 220, exit 60 93,
    exit_group 231 94, futex 202 98, set_robust_list 273 99, rseq 334 293, set_tid_address 218 96,
    gettid 186 178, sched_yield 24 124, sched_getaffinity 204 123, nanosleep 35 101,
    clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -,
    getitimer 36 102, setitimer 38 103, alarm 37 -, times 100 153, getrusage 98 165, sysinfo 99 179,
    uname 63 160, getrandom 318 278, prlimit64 302 261, prctl 157 167, ioctl 16 29, fcntl 72 25,
    wait4 61 260, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigtimedwait 128 137,
    rt_sigsuspend 130 133, sigaltstack 131 132, pause 34 -, restart_syscall 219 128, kill 62 129,
    tgkill 234 131, getpid 39 172, getppid 110 173, getuid 102 174, geteuid 107 175, getgid 104 176,
    getegid 108 177, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create1 291 20,
    epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, eventfd2 290 19, socketpair 53 199,
    sendto 44 206, recvfrom 45 207, sendmsg 46 211, recvmsg 47 212, shutdown 48 210, getsockopt 55 209,
    setsockopt 54 208, getsockname 51 204, getpeername 52 205
"""
MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # column of the table, AUDIT_ARCH_...
COLUMN, AUDIT_ARCH = MACHINES.get(os.uname().machine, (0, 0))
NUMBER = {entry.split()[0]: int(entry.split()[COLUMN])
          for entry in SYSCALLS.split(",") if COLUMN and entry.split()[COLUMN] != "-"}

# Calls that are allowed with some arguments only: {name: [(index of the argument, mask, values allowed)]}
ARGUMENTS = {
    "prctl": [(0, ALL_BITS, {PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NAME, PR_GET_NAME})],
    "prlimit64": [(0, ALL_BITS, {0})],  # with a pid it sets the limits of another process
    # not of datagrams, which can be sent to any name
    "socketpair": [(0, ALL_BITS, {socket.AF_UNIX}), (1, 0xF, {socket.SOCK_STREAM})],
    "ioctl": [(1, ALL_BITS, {TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX})],
    # not F_SETOWN and F_SETSIG, with which the kernel sends any signal to any process
    "fcntl": [(1, ALL_BITS, {0, 1, 2, 3, 4, 5, 6, 7, 1030, 1031, 1032, 1033, 1034})],
    # O_TRUNC truncates even what is opened to be read, which the first versions of Landlock allow
    "openat": [(2, os.O_ACCMODE | O_TRUNC, {os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | O_TRUNC,
                                            os.O_RDWR | O_TRUNC})],
}
WITHOUT_LANDLOCK = {"openat": [(2, os.O_ACCMODE | os.O_CREAT | O_TRUNC, {os.O_RDONLY})]}  # nothing is written
CHANGE_FOLDERS = {"unlink", "unlinkat", "rename", "renameat", "renameat2"}


def bpf_filter(arguments, otherwise):
    """A seccomp program: calls in `arguments` pass if their arguments fit; all others get `otherwise`."""
    load, jump_if_equal, jump_if_at_least, mask_with, give = 0x20, 0x15, 0x35, 0x54, 0x06
    allow, kill, deny, missing = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # with EPERM, with ENOSYS

    def op(code, value, if_true=0, if_false=0):
        return struct.pack("HBBI", code, if_true, if_false, value)

    program = [op(load, 4), op(jump_if_equal, AUDIT_ARCH, 1, 0), op(give, kill), op(load, 0)]
    for name, conditions in arguments.items():
        block = []
        for argument, mask, values in conditions:
            block += [op(load, 16 + 8 * argument), op(mask_with, mask)]
            block += [op(jump_if_equal, value, len(values) - i) for i, value in enumerate(sorted(values))]
            block += [op(give, deny)]
        program += [op(jump_if_equal, NUMBER[name], 0, len(block) + 1), *block, op(give, allow)]
    if otherwise == "allow":
        return b"".join([*program, op(give, allow)])
    # Calls newer than Linux 5.2 are said to be missing, and libc uses older ones: clone instead of clone3.
    return b"".join([*program, op(jump_if_at_least, 424, 0, 1), op(give, missing), op(give, deny)])


class SockFprog(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_char_p)]


def apply_filter(program):
    return libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(SockFprog(len(program) // 8, program)), 0, 0) == 0


def candidate_filter(pid):
    """What C gives up beyond the zygote's filter: no process but its own threads, no signal but to itself."""
    return bpf_filter({"clone": [(0, CLONE_THREAD, {CLONE_THREAD})], "kill": [(0, ALL_BITS, {pid})],
                       "tgkill": [(0, ALL_BITS, {pid})],
                       "prctl": [(0, ALL_BITS, {PR_SET_NAME, PR_GET_NAME})]}, "allow")


def restrict_files(folder, readable):
    """Landlock: from now on nothing else opens, here and in children. -> whether this kernel does it"""
    create_ruleset, add_rule, restrict_self = 444, 445, 446  # the same numbers on all machines
    write, read, read_dir, remove, make, truncate = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8, 1 << 14
    version = libc.syscall(create_ruleset, None, 0, 1)
    if version < 1:
        return False
    known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # all rights that this kernel withholds
    ruleset = libc.syscall(create_ruleset, struct.pack("Q", known), 8, 0)
    rules = dict.fromkeys(readable, read | read_dir)
    rules |= dict.fromkeys(("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"), read | write)
    rules[folder] = read | read_dir | write | truncate | make | remove  # files; no folders, no links
    for path in filter(os.path.exists, rules):
        fd = os.open(path, os.O_PATH)
        rights = rules[path] & (known if os.path.isdir(path) else read | write)
        if libc.syscall(add_rule, ruleset, 1, struct.pack("=Qi", rights, fd), 0):
            return False
        os.close(fd)
    return libc.syscall(restrict_self, ruleset, 0) == 0


def confine(folder, readable, without):
    """Confines the zygote and all that it will fork. -> the names of the protections that are missing"""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("800")  # short of memory, the kernel ends the sandbox before the training
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # no process of this user traces the zygote or reads its memory
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))  # root keeps no capability
    landlock = "Landlock" not in without and restrict_files(folder, readable)
    arguments = {name: [] for name in NUMBER if landlock or name not in CHANGE_FOLDERS}
    arguments |= ARGUMENTS if landlock else ARGUMENTS | WITHOUT_LANDLOCK
    seccomp = "seccomp" not in without and COLUMN and apply_filter(bpf_filter(arguments, "deny"))
    return ["Landlock"] * (not landlock) + ["seccomp"] * (not seccomp)


# ---- Z, the zygote ---------------------------------------------------------------------------------------

ANY_PID = 0x7FFFFFFF  # stands for C's pid in a filter that is made before C is


def die_with(parent):
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def candidate(fds, lifeline, limits, folder, zygote, filter_template):
    """Runs in the fork, never returns. fds: the code, then either a socket to T or stdin, stdout, stderr."""
    try:
        die_with(zygote)
        source = os.pread(fds[0], os.fstat(fds[0]).st_size, 0)
        # Received descriptors are the lowest free ones, ascending: none is overwritten before its turn.
        for fd, place in zip(fds[1:], (0, 1, 2) if len(fds) == 4 else (3,)):
            os.dup2(fd, place)
        os.dup2(lifeline, 4)
        os.closerange(5, 256)
        os.chdir(folder)
        rlimits = {resource.RLIMIT_AS: limits["memory_mb"] * MIB, resource.RLIMIT_NOFILE: OPEN_FILES,
                   resource.RLIMIT_FSIZE: limits["file_mb"] * MIB,
                   resource.RLIMIT_CPU: 3 * limits["timeout_s"] + 2}  # should Z ever fail
        for kind, value in rlimits.items():
            resource.setrlimit(kind, (int(value), int(value)))
        own_filter = filter_template.replace(struct.pack("I", ANY_PID), struct.pack("I", os.getpid()))
        if own_filter and not apply_filter(own_filter):
            os._exit(1)
        if len(fds) == 4:
            os.closerange(3, 4)
            os._exit(run_script(source) & 0xFF)
        serve(source, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=3))
    finally:
        os._exit(1)


def cpu_seconds(pid):
    return time.clock_gettime((~pid << 3) | 2)  # the number of another process's CPU clock


def folder_size(folder):
    sizes = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # the program has just deleted it
                sizes.append(entry.stat(follow_symlinks=False).st_blocks * 512)
    return sum(sizes) if len(sizes) <= SCRATCH_FILES else math.inf


def run_candidate(events, tester_pid, limits, fds, folder, filter_template):
    """Waits for the end of C or puts an end to it. -> (why it had to be ended, exit status)"""
    lifeline, far_end = os.pipe()
    zygote_pid, pid = os.getpid(), os.fork()
    if not pid:
        candidate(fds, far_end, limits, folder, zygote_pid, filter_template)
    for fd in (far_end, *fds):
        os.close(fd)
    events.register(lifeline, 0)  # C alone holds its other end
    start, spent, why = time.monotonic(), None, ""
    while not why and not events.poll(1000 * TICK_S):  # until C has ended, or the caller has
        wall_s, used = time.monotonic() - start, (cpu_seconds(pid), cpu_seconds(tester_pid))
        # On a busy machine, as long as C or T computes, three times as much by the clock on the wall.
        allowed_s = limits["timeout_s"] * (1 if used == spent else 3)
        spent = used
        if used[0] >= limits["timeout_s"] or wall_s >= allowed_s:
            why = "timeout"
        elif os.stat(f"/proc/{pid}/task").st_nlink - 2 > limits["threads"]:  # a link for each, `.` and `..`
            why = "threads"
        elif folder_size(folder) > limits["disk_mb"] * MIB:
            why = "disk"
    events.unregister(lifeline)
    os.close(lifeline)
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for name in os.listdir(folder):
        os.unlink(os.path.join(folder, name))
    return why, status


def death_of(pid):
    """A descriptor that can be read once that process is gone, even if a fork of it lives on and holds our
    sockets, so that they never say so."""
    try:
        return os.pidfd_open(pid)
    except OSError:  # Linux < 5.3: the sockets have to do
        return os.pipe()[0]


def warm_up():
    """Runs a program here and its tests in a fork. What Python prepares at first use (specialised bytecode,
    caches, the compiler's classes) is then there before C is forked, or each C would do it again."""
    main, (channel, far_end) = sys.modules["__main__"], socket.socketpair()
    pid = os.fork()
    if not pid:
        job = PROGRAM | {"tests": "assert f(1, b=[2.5, 'a', None]) == (1, {})\n" * 20, "call_timeout_s": None}
        judge(job, far_end)
        os._exit(0)
    far_end.close()
    with contextlib.suppress(EOFError):
        serve(b"import math\ndef f(a: int, b=()):\n    'text'\n    return a, {x: b[x] for x in ()}", channel)
    channel.close()
    os.waitpid(pid, 0)
    sys.modules["__main__"] = main
    del sys.modules["solution"]


def zygote(config):
    control, tests = (socket.socket(fileno=fd) for fd in config["fds"])
    caller, shell = death_of(config["caller"]), os.getppid()
    sys.argv, sys.path = [""], sys.path + config["packages"]
    builtins.exit = builtins.quit = sys.exit  # of `site`, which -S leaves out
    for name in PRELOADED.split():
        importlib.import_module(name)
    importlib.import_module("_thread").stack_size(8 * MIB)  # of threads, or they would take 512 MiB each
    with contextlib.suppress(OSError):  # Z, C and T take turns: on one core none waits for another to wake up
        os.sched_setaffinity(0, {config["cpu"]})
    missing = confine(config["folder"], config["readable"], config["without"])
    filter_template = b"" if "seccomp" in missing else candidate_filter(ANY_PID)
    warm_up()
    die_with(shell)
    pid, tester_pid = os.getpid(), os.fork()
    if not tester_pid:
        control.close()
        die_with(pid)
        tester(tests)
        os._exit(0)
    tests.close()
    os.dup2(0, 2)  # /dev/null; stderr was for a failure to start
    send(control, missing)
    gc.collect()
    gc.freeze()  # so that a collection in C does not write to, and thereby copy, the zygote's pages
    events = select.poll()
    events.register(control, select.POLLIN)
    events.register(caller, select.POLLIN)
    with contextlib.suppress(OSError):
        while caller not in dict(events.poll()):
            # Not JSON: every page that Z writes to is copied once per program, and JSON writes to many.
            message, fds, *_ = socket.recv_fds(control, 256, 4)
            if not message:
                break
            limits = dict(zip(LIMITS, struct.unpack("5d", message)))
            why, status = run_candidate(events, tester_pid, limits, fds, config["folder"], filter_template)
            control.send(f"{status} {why}".encode())
    os.kill(tester_pid, signal.SIGKILL)
    os.waitpid(tester_pid, 0)


# ---- The caller ------------------------------------------------------------------------------------------

LIBRARIES = [os.path.dirname(os.__file__), f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib",
             "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime"]
# Imported, not run: to compile this file takes time, and leaves a larger heap for each fork to copy.
ZYGOTE = """import json, sys; config = json.loads(sys.argv[1]); sys.path.append(config["home"])
from sandbox import zygote; sys.path.pop(); zygote(config)"""
WITHOUT = []  # protections to do without, for tests: "Landlock", "seccomp"


class Worker:
    """A zygote with its tester, used by one thread at a time."""

    live, idle, warned = set(), [], False

    def __init__(self):
        self.owner, self.stopped, self.process = os.getpid(), False, None
        self.folder = tempfile.mkdtemp(prefix="sandbox-")
        self.control, zygote_end = socket.socketpair()
        self.tests, tester_end = socket.socketpair()
        with CHOOSING:
            self.cpu = next_cpu()
            Worker.live.add(self)
        packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        config = {"caller": self.owner, "fds": [zygote_end.fileno(), tester_end.fileno()],
                  "home": os.path.dirname(os.path.abspath(__file__)), "folder": self.folder,
                  "packages": packages, "readable": LIBRARIES + packages, "without": WITHOUT,
                  "cpu": self.cpu}
        environment = {"HOME": self.folder, "TMPDIR": self.folder, "LC_ALL": "C.UTF-8",
                       "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2",
                       "LD_BIND_NOW": "1",  # or each C would look up the same symbols again
                       "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
        # 512 MiB of stack are for recursion through C code: sorted(key=...), lru_cache
        shell = ["/bin/sh", "-c", 'ulimit -S -s 524288 2>/dev/null; "$@"; rm -rf "$0"', self.folder]
        python = [sys.executable, "-I", "-S", "-X", "utf8", "-X", "zygote", "-c", ZYGOTE, json.dumps(config)]
        try:
            with zygote_end, tester_end:
                self.process = subprocess.Popen(
                    shell + python, env=environment, cwd="/", stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, pass_fds=config["fds"],
                    start_new_session=True)  # Ctrl-C is for the caller to handle
            self.control.settimeout(START_TIMEOUT_S)
            missing, _ = receive(self.control)
        except BaseException as error:
            self.close()
            raise RuntimeError(f"the sandbox does not start ({error!r}); see above for why") from error
        if missing and not Worker.warned:
            Worker.warned = True
            print(f"sandbox: no {' and no '.join(missing)} here; see 'Not covered' in sandbox.py and use a "
                  "container", file=sys.stderr, flush=True)

    @classmethod
    def take(cls):
        """A worker that waits for work, or a new one."""
        while cls.idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                worker = cls.idle.pop()
                if worker.owner == os.getpid() and not worker.stopped and worker.process.poll() is None:
                    return worker
                worker.close()
        return cls()

    def stop(self):
        """From another thread: whoever waits for this worker gets an EOFError."""
        self.stopped = True
        for sock in (self.control, self.tests):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        if self.owner != os.getpid():  # we are a forked copy of the caller
            return
        self.stop()
        self.control.close()
        self.tests.close()
        if self.process:
            try:
                self.process.wait(1)  # Z kills C and T, waits for them and ends
            except subprocess.TimeoutExpired:
                self.process.kill()  # and the kernel kills Z, then C and T
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        Worker.live.discard(self)

    def run(self, program, limits):
        """-> result. Raises EOFError or OSError when the worker does not answer; it is to be closed then."""
        start = time.monotonic()
        with memory_file(program["code"]) as code:
            run = self.run_script if program["cases"] and not program["fn_name"] else self.run_judged
            passed, total, reason = run(code, program, limits)
        return {"passed": not reason, "reason": printable(reason or "passed"),
                "seconds": time.monotonic() - start, "tests_passed": passed, "tests_total": total}

    def start(self, limits, *files):
        message = struct.pack("5d", *(limits[name] for name in LIMITS))
        socket.send_fds(self.control, [message], [file.fileno() for file in files])

    def report(self, limits):
        self.control.settimeout(3 * limits["timeout_s"] + GRACE_S)
        status, _, why = self.control.recv(256).decode().partition(" ")
        if not status:
            raise EOFError
        return why, int(status)

    def run_script(self, code, program, limits):
        """A stdin program: one run per case."""
        passed, first_failure = 0, None
        for case in program["cases"]:
            with memory_file(case["input"]) as stdin, memory_file() as stdout, memory_file() as stderr:
                self.start(limits, code, stdin, stdout, stderr)
                failure, status = self.report(limits)
                size, stderr_size = (os.fstat(file.fileno()).st_size for file in (stdout, stderr))
                output = os.pread(stdout.fileno(), size, 0)
                said = os.pread(stderr.fileno(), 4096, max(0, stderr_size - 4096)).decode(errors="replace")
            if not failure and max(size, stderr_size) >= limits["file_mb"] * MIB:
                failure = "output limit"
            if not failure and status:
                failure = died(status, said)
            if not failure and not same_output(output, case["output"]):
                failure = "wrong answer"
            passed += not failure
            first_failure = first_failure or failure
            if failure and not program["all_cases"]:
                break
        return passed, len(program["cases"]), first_failure

    def run_judged(self, code, program, limits):
        """Asserts and calls: C and T talk to each other; the caller waits for C's end and T's verdict."""
        calls = len(program["cases"])
        job = {**program, "code": None, "call_timeout_s": limits["timeout_s"] if calls else None}
        limits = {**limits, "timeout_s": limits["timeout_s"] * (calls + 1)}
        for_tester, for_candidate = socket.socketpair()
        with for_candidate:
            with for_tester:
                send(self.tests, pack(job, None), [for_tester.fileno()])
            self.start(limits, code, for_candidate)
        why, status = self.report(limits)
        self.tests.settimeout(GRACE_S)
        (passed, total, reason), _ = receive(self.tests)
        return passed, total, reason and (why or (died(status) if reason == "gone" else reason))


def next_cpu():
    """The core that the fewest workers are on; the ranks of a torchrun begin at different ones."""
    cpus, taken = sorted(os.sched_getaffinity(0)), [worker.cpu for worker in list(Worker.live)]
    first = len(cpus) * int(os.environ.get("LOCAL_RANK", 0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(cpus[first:] + cpus[:first], key=taken.count)


@contextlib.contextmanager
def memory_file(text=""):
    with open(os.memfd_create("sandbox"), "w+b", buffering=0) as file:
        os.pwrite(file.fileno(), text.encode("utf-8", "surrogatepass"), 0)
        yield file


def died(status, said=""):
    """Why C ended by itself; `said`: the end of its stderr."""
    last_line = said.strip().rpartition("\n")[2]
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    if not last_line:
        return f"exited with status {status}"
    return "memory" if last_line.startswith("MemoryError") else f"exception: {last_line}"


def printable(text):
    return "".join(letter if letter.isprintable() else " " for letter in text[:300])


FLOAT = re.compile(rb"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?")


def same_output(output, expected):
    """Token by token. Two floats may differ by 1e-6, absolute or relative; all else is text."""
    want = expected.encode("utf-8", "surrogatepass").split()
    got = output.split(None, len(want))  # no more pieces than that, however much was printed
    return len(got) == len(want) and all(map(same_token, got, want))


def same_token(got, want):
    if got == want or not (FLOAT.fullmatch(got) and FLOAT.fullmatch(want)):
        return got == want
    return math.isclose(float(got), float(want), rel_tol=1e-6, abs_tol=1e-6)


PROGRAM = {"code": None, "tests": "", "setup": "", "entry_point": None, "cases": [], "fn_name": None,
           "all_cases": False, "timeout_s": None}


def run_tests(programs, timeout_s=6.0, memory_mb=1024, workers=None, *, file_mb=16, disk_mb=64, threads=64,
              on_result=None):
    """Runs programs against their tests -> [{"passed", "reason", "seconds", "tests_passed", "tests_total"}].

    A program is a dict with "code" and one of
      "tests": source that asserts about names of the code; optional "setup" (trusted source that runs before;
          its names win over the code's) and "entry_point" (the name under test, which wins over the setup's);
      "cases": [{"input": text, "output": text}], each a run of the code as a script;
      "cases" and "fn_name", each a call of that function or method of `class Solution`: an input is a list of
          arguments or a text with a JSON value per line, an output is a value or its JSON text.
    Optional: "timeout_s" of its own; "all_cases": go on after a failed case. Other keys are ignored.

    timeout_s: of the whole of "tests", or of one case: CPU time, and wall time unless the machine is busy.
    memory_mb: address space. file_mb: one file, and the output. disk_mb: all files. threads: at a time.
    workers: default one per core. on_result(index, result) is called in this thread as results come in.
    reason: "passed", "wrong answer", "timeout", "memory", "threads", "disk", "output limit",
    "exception: ...", "exited with status ...", "killed by ...", "no tests" or "worker died: ...".
    Equal programs run once. May be called from any thread; the workers stay for the next call. RuntimeError
    when none can start.
    """
    jobs, places = collections.deque(), {}
    for place, program in enumerate(programs):
        if not isinstance(program.get("code"), str) or not ("tests" in program or "cases" in program):
            raise ValueError(f"program {place} needs 'code' and 'tests' or 'cases'")
        program = PROGRAM | {key: program[key] for key in PROGRAM if program.get(key) is not None}
        limits = {"timeout_s": program["timeout_s"] or timeout_s, "memory_mb": memory_mb, "file_mb": file_mb,
                  "disk_mb": disk_mb, "threads": threads}
        key = repr(program)
        if key not in places:
            jobs.append((key, program, limits))
        places.setdefault(key, []).append(place)
    results, finished, busy, stopped = [None] * len(programs), queue.Queue(), set(), threading.Event()
    count = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    shared = (jobs, finished, busy, stopped)
    pool = [threading.Thread(target=work, args=shared, daemon=True) for _ in range(count)]
    try:
        for thread in pool:
            thread.start()
        for _ in places:
            key, result = finished.get()
            if isinstance(result, BaseException):
                raise result
            for place in places[key]:
                results[place] = dict(result)
                if on_result:
                    on_result(place, results[place])
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
    """A thread of run_tests: takes jobs while there are any."""
    worker = None
    try:
        while jobs and not stopped.is_set():
            with contextlib.suppress(IndexError):  # another thread took the last one
                key, program, limits = jobs.popleft()
                worker = worker or Worker.take()
                busy.add(worker)
                if stopped.is_set():  # an interrupt while this worker started, when it was not yet busy
                    break
                try:
                    result = worker.run(program, limits)
                except Exception as error:
                    busy.discard(worker)
                    worker.close()
                    worker = None
                    # A tester that does not come back is in a test that the program's answers made endless.
                    reason = "timeout" if isinstance(error, TimeoutError) else f"worker died: {error!r}"
                    result = {"passed": False, "reason": reason, "seconds": limits["timeout_s"],
                              "tests_passed": 0, "tests_total": len(program["cases"]) or 1}
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


def close_workers():
    """Ends the workers that wait for the next call of run_tests. Called at exit."""
    for worker in list(Worker.live):
        worker.close()


if "zygote" not in sys._xoptions:
    atexit.register(close_workers)
