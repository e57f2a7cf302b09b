"""Runs model-written Python against its tests and says, unforgeably, which programs pass.

    from sandbox import run_tests
    run_tests([{"code": "def add(a, b): return a + b", "tests": "assert add(1, 2) == 3"}])
    -> [{"passed": True, "reason": "passed"}]

A policy trained on this reward finds whatever makes the verdict say "passed", and a base model writes `os.remove`,
`while True` and fork bombs without meaning to. So the program is hostile; the tests and the owner of the machine are
not. Whatever a process prints, returns or exits with after success, a program inside that process can produce, too. So
program and test never share a process.

    caller --- limits, files ---> Z  zygote, one per worker: a fresh, confined Python. It forks per program
                                  |- T  tester: runs the trusted tests, writes the verdict
                                  '- C  candidate: runs the program
                             C <---> T  calls and their results, as JSON

- C holds stdin, stdout and stderr, or a pipe to T. No test is in its memory (it is a copy of Z, which reads
  neither code nor tests) nor in a file that it can open, and it can neither trace nor signal another process. All it
  can do is answer T's calls, rightly or wrongly.
- T executes the tests. A name that a test does not define is asked from C. C's answers are JSON that can only become
  plain data (`PLAIN`). Other objects stay in C, and T holds a number for them: such a `Handle` never equals or computes
  with plain data. The verdict goes to a memory file that C does not hold.
- A stdin program needs no T: C reads one memory file and writes another; the caller compares when C is dead.
- Nothing lasts from one program to the next: C is new each time, and T unless the test was `harmless`.

**Confinement.** Landlock (`restrict_files`): the libraries of Python and of the system can be read, hardly anything
else (`LIBRARIES`), and no file can be written. seccomp (`SYSCALLS`): a list of what is allowed; not in it are exec,
ptrace, mount, chmod, memfd, shared memory and all sockets but a pair. C cannot fork either (`CANDIDATE`): a program is
one process and SIGKILL ends all of it. There are no capabilities, hardly any environment, and limits on time, memory,
output and threads (the machine's own where they are smaller).

**Verdict or error.** A verdict is about the program. If the machine is at fault (no process can be forked, a worker
dies, the kernel kills for want of memory), the program runs once more; if that fails, too, `SandboxError` is raised.
Each new worker first runs programs that are known to be right.

**What crosses.** From C to T plain data; a value of a subclass becomes one of its base class, a namedtuple, Counter or
array stays one. A call that returned None also gives its arguments that are lists, dicts, sets, deques or arrays the
content that they have afterwards. Other calls do not: else `x.clear(); return []` would meet `f(x) == sorted(x)`. A
test may pass functions and iterators (C calls back), and importable functions and types (by name). The program itself
compares and combines two of its objects. What cannot cross: operators between an object of the program and plain data,
its type, its use in `with`, instances of the test's own classes, the identity of lists, what both sides would share
(`random.seed`, captured stdout, patches).

**Not covered.** Kernel exploits; stat() of any path; reading the installed packages; tests that can be met without
computing anything (`assert f(x)`, `np.allclose(f(x), 3)` by `[]`, two objects of the program that it says are equal); a
callback that runs what it is given. Programs cannot use subprocess or multiprocessing or write files. Without Landlock
(Linux < 5.13, gVisor) a program can read what this user can, the caller's memory with the tests included; on a machine
other than x86_64 it can do most of what this user can. Both are said on stderr: use a container then. Linux only.
"""

import __future__

import _thread
import atexit
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
import marshal
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

if "zygote" not in sys._xoptions:  # only the caller needs these
    import opcode
    import subprocess
    import threading
    from concurrent.futures import ThreadPoolExecutor

    atexit.register(lambda: close_workers())
    os.register_at_fork(after_in_child=lambda: (Worker.live.clear(), Worker.idle.clear()))

MIB = 1 << 20
OUTPUT_MB, THREADS, OPEN_FILES = 16, 64, 64  # what one program may write to stdout or stderr, start and open
ANSWER_LIMIT, TESTER_MB = 16 * MIB, 2048  # bytes of one answer of C as JSON; MiB of T's address space
TESTER_STAYS_KB = 100 << 10  # T does not stay for another program if it has used more memory than this
TICK_S = 0.05  # how often the threads and the CPU time of a running program are looked at
START_TIMEOUT_S, GRACE_S = 120, 20  # until a worker must be ready; for each program that it then runs first
BUSY = 10  # seconds on the clock for a second of CPU time, on a core that others use too
GONE = 3  # T's exit status when C did not answer any more


class SandboxError(RuntimeError):
    """The machine, not a program, is at fault. The message names its limits."""


# ---- Plain data as JSON: None, bool, int, float, str as they are, the rest as [name of the class, part, ...]


def array(dtype, shape, values):
    if not re.fullmatch(r"[<>|=][biufcSU]\d+", dtype):  # no array of objects
        raise ValueError(dtype)
    return importlib.import_module("numpy").array(values, dtype).reshape(shape)


def namedtuple(name, fields, *parts):
    fields = tuple(map(str, fields))  # of one text, "isdigit", the class would make a name
    if (name, fields) not in NAMEDTUPLES and Handle.WITHHELD.isdisjoint(fields):
        NAMEDTUPLES[name, fields] = collections.namedtuple(name, fields)  # which checks that they are names
    return NAMEDTUPLES[name, fields]._make(parts)


NAMEDTUPLES = {}  # (name, fields): in C the program's class, in T one like it, until the next program
PLAIN = {  # name of the class: (value -> parts; parts -> value)
    "int": (lambda value: [int.__int__(value)], int),  # also of a subclass, as in the next two
    "float": (lambda value: [float.__float__(value)], float),
    "str": (lambda value: [str.__str__(value)], str),
    "bytes": (lambda value: [value.decode("latin-1")], lambda text: text.encode("latin-1")),
    **{kind.__name__: (list, lambda *parts, kind=kind: kind(parts)) for kind in (list, tuple, set, frozenset)},
    "dict": (lambda value: [[*value], [*value.values()]], lambda keys, values: dict(zip(keys, values))),
    "complex": (lambda value: [value.real, value.imag], complex),
    "range": (lambda value: [value.start, value.stop, value.step], range),
    "slice": (lambda value: [value.start, value.stop, value.step], slice),
    "collections.deque": (list, lambda *parts: collections.deque(parts)),
    "collections.Counter": (lambda value: [dict(value)], collections.Counter),
    "decimal.Decimal": (lambda value: [str(value)], decimal.Decimal),
    "fractions.Fraction": (lambda value: [value.numerator, value.denominator],  # ints, not "1e999999999"
                           lambda *parts: fractions.Fraction(*map(operator.index, parts))),
    "datetime.date": (lambda value: [value.isoformat()], datetime.date.fromisoformat),
    "datetime.time": (lambda value: [value.isoformat()], datetime.time.fromisoformat),
    "datetime.datetime": (lambda value: [value.isoformat()], datetime.datetime.fromisoformat),
    "datetime.timedelta": (lambda value: [value.days, value.seconds, value.microseconds], datetime.timedelta),
    "numpy.ndarray": (lambda value: [value.dtype.str, value.shape, value.ravel().tolist()], array),
    "namedtuple": (lambda value: [type(value).__name__, type(value)._fields, *value], namedtuple),
}
CHANGEABLE = (list, dict, set, collections.deque)  # and arrays


def pack(value, peer):
    """`peer.outgoing` packs what is not plain data."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return pack(value.item(), peer)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        NAMEDTUPLES.setdefault((kind.__name__, kind._fields), kind)
        name = "namedtuple"
    elif name not in PLAIN or name == "numpy.ndarray" and value.dtype.kind not in "biufcSU":
        bases = (int, float, str, bytes, list, tuple, set, frozenset, dict)  # a value of a subclass travels as these
        name = next((base.__name__ for base in bases if isinstance(value, base)), None)
    if name is None:
        return peer.outgoing(value)
    return [name, *[pack(part, peer) for part in PLAIN[name][0](value)]]


def unpack(message, peer):
    """What `pack`, or an attacker, has written. The result is made of `PLAIN` and of `peer.incoming`."""
    if type(message) is not list:
        return message
    name, *parts = message
    if name not in PLAIN:
        return peer.incoming(name, *parts)
    return PLAIN[name][1](*[unpack(part, peer) if type(part) is list else part for part in parts])


def replace(old, new):
    """Gives a list, dict, set, deque or array the content of another one."""
    if type(old).__name__ == "ndarray":
        old[...] = new
    else:
        old.clear()
        (old.update if isinstance(old, (dict, set)) else old.extend)(new)


class Peer:
    """One end of the channel between C and T: a JSON text per line. Either asks, and answers while it waits for an
    answer."""

    def __init__(self, pipe):
        self.pipe, self.lock = pipe, _thread.RLock()  # a program's threads may call back
        self.shown, self.numbers = [], {}  # what the other side knows by number; id -> number

    def send(self, *message):
        line = memoryview(json.dumps(message).encode() + b"\n")
        while line:
            line = line[os.write(self.pipe, line) :]

    def receive(self):
        line = bytearray()
        while not line.endswith(b"\n"):
            part = os.read(self.pipe, 1 << 16)
            line += part
            if not part or len(line) > self.limit:
                raise EOFError
        return json.loads(line.decode())

    def exchange(self, *message):
        self.send(*message)
        while (answer := self.receive())[0] not in ("value", "error"):
            self.answer(*answer)
        return answer

    def ask(self, request, /, *args, **named):
        packed = [pack(arg, self) for arg in args], {name: pack(arg, self) for name, arg in named.items()}
        with self.lock:
            kind, *message = self.exchange(request, *packed)
        if kind == "error":
            kind, args, state = (unpack(part, self) for part in message)
            error = kind(*args)
            vars(error).update(state)
            if isinstance(error, StopIteration) and request != "next":  # it could end a loop in the test
                error = RuntimeError("StopIteration")
            raise error
        value, contents = unpack(message[0], self), message[1]
        for old, new in zip((*args, *named.values()), contents if value is None else []):
            if isinstance(old, CHANGEABLE) or type(old).__name__ == "ndarray":
                replace(old, unpack(new, self))
        return value

    def answer(self, request, args, named):
        try:
            args, named = [unpack(arg, self) for arg in args], {name: unpack(arg, self) for name, arg in named.items()}
            value = self.perform(request, *args, **named)
            contents = [pack(arg, self) for arg in (*args, *named.values())] if value is None else []
            answer = "value", pack(value, self), contents
        except self.caught as error:
            name, text = type(error).__name__, str(error)[:500]
            state = vars(error) | {"text": text, "report": f"{name}: {text}" if text else name}
            answer = "error", *[pack(part, self) for part in (type(error), error.args, state)]
        self.send(*answer)

    def number(self, value):
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.shown)
            self.shown.append(value)
        return self.numbers[id(value)]


# ---- C, the candidate. This runs inside the hostile process: it serves honest programs, it guards nothing. ---


def load(source, name):
    """-> the program's module, not yet run, and its code"""
    module, flags = types.ModuleType(name), 0
    sys.modules["__main__"] = sys.modules[name] = module
    if b"from __future__ import" in source:  # after a preamble it would be an error
        source = re.sub(rb"(?m)^from __future__ import (\([^)]*\)|[^\n;]*)(; *)?", b"", source)
        flags = __future__.annotations.compiler_flag  # all other features have long been part of Python
    return module, compile(source, f"{name}.py", "exec", flags, dont_inherit=True)


def run_script(source):
    """The program as `python program.py` would run it. -> exit status"""
    status = 0
    try:
        module, code = load(source, "__main__")
        exec(code, module.__dict__)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        status = 1
        sys.excepthook(*sys.exc_info())
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()  # waits for the threads that are not daemons
    atexit._run_exitfuncs()
    made, kinds = gc.get_objects(), (io.TextIOWrapper, io.BufferedWriter)  # what was there before is frozen
    writers = [thing for kind in kinds for thing in made if issubclass(type(thing), kind)]
    for stream in (sys.__stdout__, sys.stdout, *writers):  # all that Python would flush at its end
        with contextlib.suppress(ValueError, AttributeError, OSError):  # closed, or replaced by the program
            stream.flush()
    return status


class Candidate(Peer):
    """The program as an imported module, which answers T's requests until T hangs up."""

    limit, caught = math.inf, BaseException  # T is trusted

    def perform(self, request, /, *args, **named):
        if request in ("load", "find"):
            return getattr(self, request)(*args)
        return (getattr(builtins, request, None) or getattr(operator, f"__{request}__"))(*args, **named)

    def serve(self, source):
        self.source = source
        while True:
            self.answer(*self.receive())

    def load(self):
        self.module, code = load(self.source, "solution")
        exec(code, self.module.__dict__)

    def find(self, name):
        names = vars(self.module)
        own = getattr(names.get(name), "__module__", None) == "solution"
        if not own and hasattr(names.get("Solution"), name):  # LeetCode's form, before what `*` has imported
            return getattr(names["Solution"](), name)
        if name not in names:
            raise NameError(f"name '{name}' is not defined")
        return names[name]

    def outgoing(self, value):
        if isinstance(value, type) and value.__module__ == "builtins":
            return ["named", "builtins", value.__name__]
        if isinstance(value, type) and issubclass(value, BaseException):
            bases = [self.outgoing(base) for base in value.__bases__ if issubclass(base, BaseException)]
            return ["exception", self.number(value), value.__name__, value.__module__, *bases]
        return ["mine", self.number(value)]

    def incoming(self, tag, *parts):
        if tag == "yours":
            return self.shown[parts[0]]
        if tag == "named":
            module, name = parts
            return operator.attrgetter(name)(importlib.import_module(module))
        number, request = parts
        if request == "next":
            return iter(lambda: self.ask("next", number), object())  # which StopIteration ends
        return lambda *args, **named: self.ask("call", number, *args, **named)


# ---- T, the tester ------------------------------------------------------------------------------------------

# The classes that C may name. SystemExit is not one of them: it could end the test.
CLASSES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)
           and (name in PLAIN or name in ("object", "type", "bool") or issubclass(kind, Exception))}
CLASSES["NoneType"] = type(None)
# `Bad = Exception` in a program must not make `except Bad` catch the test's own `assert False`
CLASSES |= {kind.__name__: type(kind.__name__, (kind,), {}) for kind in (Exception, AssertionError)}


class Program(Peer):
    """C, as T sees it."""

    limit, caught = ANSWER_LIMIT, Exception

    def __init__(self, pipe):
        super().__init__(pipe)
        self.known, self.used = {}, False  # what stays in C: number -> handle or exception class

    def exchange(self, request, *args):
        self.used |= request not in ("load", "find")
        try:
            return super().exchange(request, *args)
        except (EOFError, ConnectionError):
            os._exit(GONE)  # no `except` in a test catches that

    def perform(self, request, /, number, *args, **named):
        return next(self.shown[number]) if request == "next" else self.shown[number](*args, **named)

    def outgoing(self, value):
        if type(value) is Handle or isinstance(value, type) and "_number" in vars(value):
            return ["yours", value._number]
        home = getattr(getattr(value, "__objclass__", value), "__module__", None)  # `str.upper` is of `str`
        name = getattr(value, "__qualname__", None)
        if name and home in sys.modules and home.partition(".")[0] in {*sys.stdlib_module_names, "numpy"}:
            with contextlib.suppress(AttributeError):
                if operator.attrgetter(name)(sys.modules[home]) == value:
                    return ["named", home, name]  # C uses its own: with T's `eval` it could forge
        if hasattr(type(value), "__next__"):
            return ["mine", self.number(value), "next"]
        if callable(value):
            return ["mine", self.number(value), "call"]
        raise TypeError(f"a test cannot pass a {type(value).__name__} to the program")

    def incoming(self, tag, *parts):
        if tag == "named":
            return CLASSES.get(parts[1], RuntimeError)
        number, *rest = parts
        if number not in self.known and tag == "mine":
            self.known[number] = Handle(self, number)
        elif number not in self.known and tag == "exception":
            name, home, *bases = rest
            same = getattr(sys.modules.get(home), name, None)  # `except json.JSONDecodeError` is to catch it
            found = isinstance(same, type) and issubclass(same, Exception) and same.__module__ != "unittest.case"
            bases = (same,) if found else tuple(unpack(base, self) for base in bases)
            members = {"__init__": Exception.__init__} if found else {}  # the library's own may want other arguments
            self.known[number] = type(name, bases, members | {"__str__": said, "_number": number})
        return self.known[number]


def said(error):
    """str() of an exception whose class is like one of C's: what C said when it raised it."""
    return vars(error).get("text", Exception.__str__(error))


class Handle:
    """In T: an object of C that is not plain data (a function, an instance, an iterator). Calls, attributes,
    items and iteration go to C, and operators between two handles. A handle never equals plain data."""

    __slots__ = ("_program", "_number")
    # `assert f(x).isdigit()` wants a str; an object of C would just say yes
    WITHHELD = {name for kind in (str, float, set) for name in dir(kind) if re.match("is|.*with$", name)}

    def __init__(self, program, number):
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name):
        # from `__array_interface__` numpy would take an address in T, and read there
        if name in Handle.WITHHELD or name.startswith("__") and name != "__name__":
            raise AttributeError(f"'{name}' of an object that is not plain data")
        return self._program.ask("getattr", self, name)

    def __instancecheck__(self, value):
        return type(value) in (Handle, *NAMEDTUPLES.values()) and self._program.ask("isinstance", value, self)

    def __subclasscheck__(self, kind):
        return type(kind) is Handle and self._program.ask("issubclass", kind, self)


def request_method(name):
    def method(self, /, *args, **named):
        if name in OPERATORS and type(args[0]) is not Handle:
            return NotImplemented
        return self._program.ask(name, self, *args, **named)

    return method


OPERATORS = ("eq", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and",
             "or", "xor", "lshift", "rshift")
for _name in ("call", "setattr", "delattr", "len", "bool", "str", "repr", "hash", "iter", "next", "getitem", "setitem",
              "delitem", "neg", "pos", "abs", "invert", *OPERATORS):
    setattr(Handle, f"__{_name}__", request_method(_name))


class TestNamespace(dict):
    """The globals of a test. A name that neither the test nor Python defines is the candidate's."""

    def __init__(self, program, called, under_test):
        super().__init__(__name__="tests", __builtins__=builtins)
        self.program, self.called, self.under_test = program, called, under_test

    def __missing__(self, name):
        if name not in self.under_test:
            if hasattr(builtins, name):
                raise KeyError(name)  # Python looks there next
            if name in sys.stdlib_module_names and name not in self.called:
                return importlib.import_module(name)  # `math.isclose` in a test is the true one
        try:
            value = self.program.ask("find", name)
        except NameError:
            raise KeyError(name) from None
        self.program.used |= not isinstance(value, Handle)  # a constant, or a built-in class
        return value


def run_asserts(program, job):
    """-> "no tests" or None; a test that fails raises."""
    code, under_test = job["tests"], {job["entry_point"]} - {None}
    namespace = TestNamespace(program, job["called"], under_test)
    exec(job["setup"], namespace)
    if vars(builtins).keys() >= set(code.co_names):  # the test is about a redefined builtin: MBPP 126's `sum`
        under_test.update(code.co_names)
    for name in under_test:
        namespace.pop(name, None)
    exec(code, namespace)
    return None if program.used else "no tests"


def run_case(program, name, case):
    """-> why a call of the function has failed or None"""
    function, args, expected = program.ask("find", name), case["input"], case["output"]
    if lines := isinstance(args, str):
        args = [json.loads(line) for line in args.split("\n") if line.strip()]
    if lines and isinstance(expected, str):  # beside a list of arguments it is the value: the text "12" is no number
        with contextlib.suppress(ValueError):
            expected = json.loads(expected)
    try:
        got = function(*args)
    except TypeError:
        if not (lines and len(args) == 1 and isinstance(args[0], list)):
            raise
        got = function(*args[0])  # some data sets write all arguments as one list
    return None if same_value(got, expected) else "wrong answer"


def same_value(got, expected):
    """Equality of plain data as JSON has it: a tuple is a list; two floats may differ by rounding."""
    if type(got).__module__ == "numpy":
        got = got.tolist()
    if isinstance(got, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(got) == len(expected) and all(map(same_value, got, expected))
    if isinstance(got, dict) and isinstance(expected, dict):
        got = {key if key in expected else str(key): value for key, value in got.items()}  # JSON has no other keys
        return got.keys() == expected.keys() and all(same_value(got[key], expected[key]) for key in got)
    if isinstance(got, float) and isinstance(expected, float):
        return math.isclose(got, expected, rel_tol=1e-6, abs_tol=1e-6)
    return got == expected


def explain(error):
    report = getattr(error, "report", None)  # raised in C, not by the test
    if isinstance(error, AssertionError) and not report:
        return "wrong answer"
    if isinstance(error, MemoryError):
        return "memory"
    return f"exception: {report or f'{type(error).__name__}: {error}'}"[:300]  # all of it may not fit the file


def judge(program, job):
    """Yields for each case None or why it has failed."""
    try:
        program.ask("load")
    except BaseException as error:
        yield explain(error)
        return
    for case in job["cases"] or [None]:
        try:
            failure = run_case(program, job["fn_name"], case) if case else run_asserts(program, job)
        except BaseException as error:
            failure = explain(error)
        yield failure
        if failure and not job["all_cases"]:
            return


def tester(control):
    """All of T's life: one program after the other, until a test was not `harmless`, imported something, or used much
    memory. So no verdict depends on the programs before."""
    lower_limit(resource.RLIMIT_AS, TESTER_MB * MIB)
    modules = len(sys.modules)
    while True:
        _, fds, *_ = socket.recv_fds(control, 1, 3)
        job, verdict, pipe = fds
        job = marshal.loads(os.pread(job, os.fstat(job).st_size, 0))
        program = Program(pipe)
        for failure in judge(program, job):
            os.write(verdict, json.dumps(failure).encode() + b"\n")
        grown = len(sys.modules) > modules or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > TESTER_STAYS_KB
        if grown or not job["harmless"]:
            os._exit(0)
        NAMEDTUPLES.clear()
        program.pipe = -1  # a generator's `finally` may run later, as garbage, and must not ask the next
        for fd in fds:
            os.close(fd)
        control.send(b"1")


# ---- Confinement --------------------------------------------------------------------------------------------

libc = ctypes.CDLL(None)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 15, 16, 22, 38
CLONE_THREAD, ALL_BITS, WRITE, READ_WRITE, O_TRUNC = 0x10000, 0xFFFFFFFF, os.O_WRONLY, os.O_RDWR, os.O_TRUNC
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
ANY_PID = 0x7FFFFFFF  # stands for C's pid in the filter, which is made before C is

# What Python and its libraries need: the name and the number on x86_64. Other machines have no filter.
SYSCALLS = """
    read 0, write 1, readv 19, writev 20, pread64 17, pwrite64 18, lseek 8, close 3, close_range 436, dup 32, dup2 33,
    dup3 292, pipe 22, pipe2 293, openat 257, fstat 5, newfstatat 262, stat 4, lstat 6, statx 332, access 21,
    faccessat 269, readlink 89, readlinkat 267, getdents64 217, getcwd 79, chdir 80, fchdir 81, brk 12, mmap 9,
    munmap 11, mremap 25, mprotect 10, madvise 28, msync 26, clone 56, exit 60, exit_group 231, futex 202,
    set_robust_list 273, rseq 334, set_tid_address 218, gettid 186, sched_yield 24, sched_getaffinity 204, nanosleep 35,
    clock_nanosleep 230, clock_gettime 228, clock_getres 229, gettimeofday 96, time 201, getitimer 36, setitimer 38,
    alarm 37, times 100, getrusage 98, sysinfo 99, uname 63, getrandom 318, prlimit64 302, prctl 157, ioctl 16,
    fcntl 72, wait4 61, rt_sigaction 13, rt_sigprocmask 14, rt_sigreturn 15, rt_sigtimedwait 128, rt_sigsuspend 130,
    sigaltstack 131, pause 34, restart_syscall 219, kill 62, tgkill 234, getpid 39, getppid 110, getuid 102,
    geteuid 107, getgid 104, getegid 108, poll 7, ppoll 271, select 23, pselect6 270, epoll_create1 291, epoll_ctl 233,
    epoll_wait 232, epoll_pwait 281, eventfd2 290, socketpair 53, sendto 44, recvfrom 45, sendmsg 46, recvmsg 47,
    shutdown 48, getsockopt 55, setsockopt 54, getsockname 51, getpeername 52
"""
X86_64 = 0xC000003E
NUMBER = {name: int(number) for name, number in map(str.split, SYSCALLS.split(","))}
HAS_FILTER = os.uname().machine == "x86_64"

# Calls that C may make with some arguments only: {name: [(index of the argument, mask, values allowed)]}. If SIGKILL
# ends C, that was the machine: C cannot send it to itself, nor set a limit on its CPU time.
SIGNALS, LIMITS = set(range(32)) - {signal.SIGKILL}, set(range(16)) - {resource.RLIMIT_CPU}
CANDIDATE = {
    "clone": [(0, CLONE_THREAD, {CLONE_THREAD})],  # threads, no processes
    "kill": [(0, ALL_BITS, {ANY_PID}), (1, ALL_BITS, SIGNALS)],  # only itself
    "tgkill": [(0, ALL_BITS, {ANY_PID}), (2, ALL_BITS, SIGNALS)],
    "prlimit64": [(0, ALL_BITS, {0}), (1, ALL_BITS, LIMITS)],  # with a pid it sets the limits of another process
    "prctl": [(0, ALL_BITS, {PR_SET_NAME, PR_GET_NAME})],
    "sendmsg": [(0, ALL_BITS, set())],  # never: open files on their way count for all processes of this user
    # not of datagrams, which can be sent to any name
    "socketpair": [(0, ALL_BITS, {socket.AF_UNIX}), (1, 0xF, {socket.SOCK_STREAM})],
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    "ioctl": [(1, ALL_BITS, {0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451})],
    # not F_SETOWN and F_SETSIG, with which the kernel sends any signal to any process
    "fcntl": [(1, ALL_BITS, {0, 1, 2, 3, 4, 5, 6, 7, 1030, 1031, 1032, 1033, 1034})],
    # O_TRUNC truncates even what is opened to be read, which the first version of Landlock allows
    "openat": [(2, os.O_ACCMODE | O_TRUNC, {os.O_RDONLY, WRITE, READ_WRITE, WRITE | O_TRUNC, READ_WRITE | O_TRUNC})],
}

ONLY_TO_READ = {"openat": [(2, os.O_ACCMODE | os.O_CREAT | O_TRUNC, {os.O_RDONLY})]}  # where Landlock is missing


class Filter:
    """A seccomp program: the calls in `arguments` pass if their arguments fit. others: whether all others pass. It is
    made before the fork; C only sets its own pid there."""

    def __init__(self, arguments, others):
        load, jump_if_equal, jump_if_at_least, mask_with, give = 0x20, 0x15, 0x35, 0x54, 0x06
        allow, kill, deny, missing = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # with EPERM, with ENOSYS

        def op(code, value, if_true=0, if_false=0):
            return struct.pack("HBBI", code, if_true, if_false, value)

        program = [op(load, 4), op(jump_if_equal, X86_64, 1, 0), op(give, kill), op(load, 0)]
        for name, conditions in arguments.items():
            block = []
            for argument, mask, values in conditions:
                block += [op(load, 16 + 8 * argument), op(mask_with, mask)]
                block += [op(jump_if_equal, value, len(values) - i) for i, value in enumerate(sorted(values))]
                block += [op(give, deny)]
            program += [op(jump_if_equal, NUMBER[name], 0, len(block) + 1), *block, op(give, allow)]
        if not others:  # Calls newer than Linux 5.2 are said to be missing: libc then uses clone instead of clone3
            program += [op(jump_if_at_least, 424, 0, 1), op(give, missing)]
        program += [op(give, allow if others else deny)]
        self.words = (ctypes.c_uint32 * (2 * len(program))).from_buffer_copy(b"".join(program))
        self.pids = [place for place, word in enumerate(self.words) if word == ANY_PID]
        self.address = struct.pack("HP", len(program), ctypes.addressof(self.words))

    def apply(self):
        for place in self.pids:
            self.words[place] = os.getpid()
        if libc.prctl(PR_SET_SECCOMP, 2, self.address, 0, 0):
            raise OSError("this Linux has no seccomp filters")


def restrict_files(readable):
    """Landlock: from now on nothing else opens, here and in children. -> whether this kernel does it"""
    write, read, read_dir, all_rights = 1 << 1, 1 << 2, 1 << 3, (1 << 13) - 1  # those of the first version
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, struct.pack("Q", all_rights), 8, 0)
    if ruleset < 0:
        return False
    for path in filter(os.path.exists, readable):
        fd = os.open(path, os.O_PATH)
        rights = read | (read_dir if os.path.isdir(path) else write if path.startswith("/dev/") else 0)
        libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, fd), 0)
        os.close(fd)
    done = libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return done


def lower_limit(kind, limit):
    """Never above what this process has inherited."""
    inherited = resource.getrlimit(kind)[1]
    limit = limit if inherited == resource.RLIM_INFINITY else min(limit, inherited)
    resource.setrlimit(kind, (limit, limit))


def confine(readable, without):
    """Confines the zygote and all that it will fork. -> the names of the protections that are missing"""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("800")  # short of memory, the kernel ends the sandbox before the training
    lower_limit(resource.RLIMIT_CORE, 0)
    lower_limit(resource.RLIMIT_NOFILE, 1 << 16)  # on the way to Z and T, the files of all workers count together
    lower_limit(resource.RLIMIT_FSIZE, OUTPUT_MB * MIB)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # no process of this user traces the zygote or reads its memory
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))  # root keeps no capability
    landlock = "Landlock" not in without and restrict_files(readable)
    seccomp = "seccomp" not in without and HAS_FILTER
    if seccomp:
        Filter(dict.fromkeys(NUMBER, []) | ({} if landlock else ONLY_TO_READ), others=False).apply()
    return ["Landlock"] * (not landlock) + ["seccomp"] * (not seccomp)


# ---- Z, the zygote ------------------------------------------------------------------------------------------


def fork(role, *args):
    """-> pid of a process that runs role(*args), and dies with this one"""
    zygote_pid, pid = os.getpid(), os.fork()
    if pid:
        return pid
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == zygote_pid:  # it did not die before the line above
            role(*args)
    finally:
        os._exit(1)


def ended(pid, wait_s):
    """-> exit status of a process, or None if it still runs after so long"""
    deadline = time.monotonic() + wait_s
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if (left_s := deadline - time.monotonic()) <= 0:
            return None
        signal.sigtimedwait([signal.SIGCHLD], left_s)


def end(pid, wait_s):
    """-> exit status of a process, or None if it has not ended after so long and had to be killed"""
    status = ended(pid, wait_s)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return status


def candidate(code, fds, limits):
    """All of C's life. fds: the pipe to T, or stdin, stdout and stderr."""
    _, memory_mb, own_filter = limits
    source, script = os.pread(code, os.lseek(code, 0, os.SEEK_END), 0), len(fds) == 3
    first = 0 if script else 3
    for number, fd in enumerate(fds, first):  # fds ascends: none is overwritten before its turn
        os.dup2(fd, number)
    os.closerange(first + len(fds), 256)
    lower_limit(resource.RLIMIT_AS, int(memory_mb * MIB))
    lower_limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    if own_filter:
        own_filter.apply()
    if script:
        os._exit(run_script(source) & 0xFF)
    Candidate(3).serve(source)


def watch(pids, done, verdict, limits):
    """Waits until done(seconds) is not None. -> that, and why the program must be ended before, or ""

    A program has `timeout_s` of CPU time, and as much on the clock beyond BUSY times the CPU time that it has used: one
    that sleeps is ended soon, one that shares its core is not cut short. Each case has that time anew: one is done when
    the file `verdict` has grown.
    """

    def clocks():  # the time, and the CPU time of each process, whose clock has the number (~pid << 3) | 2
        return [time.monotonic(), *(time.clock_gettime((~pid << 3) | 2) for pid in pids)]

    start, cases, caller, timeout_s = clocks(), 0, os.getppid(), limits[0]
    while (result := done(TICK_S)) is None:
        elapsed_s, *used_s = map(operator.sub, clocks(), start)
        if verdict and os.fstat(verdict).st_size > cases:
            start, cases = clocks(), os.fstat(verdict).st_size
        elif max(used_s) >= timeout_s or elapsed_s - BUSY * sum(used_s) >= timeout_s:
            return None, "timeout"
        with contextlib.suppress(OSError):  # no /proc here
            if os.stat(f"/proc/{pids[-1]}/task").st_nlink - 2 > THREADS:  # a link for each, `.` and `..`
                return None, "threads"
        if os.getppid() != caller:
            os._exit(0)  # the caller has gone; C and T die with this process
    return result, ""


def script_job(limits, code, *fds):
    """fds: stdin, stdout, stderr. -> why C had to be ended or "", its exit status or None"""
    pid = fork(candidate, code, fds, limits)
    status, why = watch([pid], functools.partial(ended, pid), None, limits)
    return why, end(pid, 0) if why else status


def judged_job(limits, testers, code, job, verdict):
    """testers: the socket and pid of T, or nothing yet. -> why C and T had to be ended or "", exit status of T
    (None if it stays or was killed), exit status of C or None"""
    if not testers:
        ours, theirs = socket.socketpair()
        with theirs:
            testers += ours, fork(tester, theirs)
    control, tester_pid = testers
    ours, theirs = socket.socketpair()
    with ours, theirs:  # closed here, so that T and C can see each other's end
        pid = fork(candidate, code, [ours.fileno()], limits)
        socket.send_fds(control, [b"1"], [job, verdict, theirs.fileno()])

    def heard(wait_s):  # T is done, or has ended
        return select.select([control], [], [], wait_s)[0] or None

    status, (_, why) = None, watch([tester_pid, pid], heard, verdict, limits)
    if why or not control.recv(1):  # T does not stay
        status = end(tester_pid, 0 if why else 1)
        control.close()
        testers.clear()
    return why, status, end(pid, 1 if status == GONE else 0)


def warm_up():
    """Plays C and T once. What Python prepares at first use (specialised bytecode, caches) is then there before C and T
    are forked, or each of them would do it again."""
    main, code = sys.modules["__main__"], b"import math\ndef f(a: int, b=()): return a, {x: b for x in ()}"
    tests, setup = (compile(text, "", "exec") for text in ("assert f(1, b=[2.5, 'a']) == (1, {})\n" * 20, ""))
    job = {"tests": tests, "setup": setup, "entry_point": None, "called": set(), "cases": [], "all_cases": False}
    ours, theirs = socket.socketpair()
    program, candidate = Program(ours.fileno()), Candidate(theirs.fileno())
    candidate.source, receive = code, program.receive
    program.receive = lambda: candidate.answer(*candidate.receive()) or receive()  # they take turns
    list(judge(program, job))
    run_script(b"print(1)")
    sys.modules["__main__"] = main
    del sys.modules["solution"]


def zygote(config):
    control, caller = socket.socket(fileno=os.dup(config["control"])), os.getppid()
    os.close(config["control"])  # its number may be large, and a C would not close it
    sys.argv, sys.path = [""], sys.path + config["packages"]
    builtins.exit = builtins.quit = sys.exit  # of `site`, which -S leaves out
    sys.set_int_max_str_digits(0)
    sys.setrecursionlimit(5000)  # for data nested 500 deep
    _thread.stack_size(8 * MIB)  # of threads, or they would take 512 MiB each
    # Programs often import these. `threading` and `random` would do work at each fork.
    for name in ("array", "bisect", "copy", "heapq", "itertools", "string", "typing"):
        importlib.import_module(name)
    with contextlib.suppress(OSError):  # Z, C and T take turns: on one core none waits for another to wake up
        os.sched_setaffinity(0, {config["core"]})
    missing = confine(config["readable"], config["without"])
    own_filter = None if "seccomp" in missing else Filter(CANDIDATE, others=True)
    warm_up()
    os.dup2(0, 2)  # /dev/null; stderr was for a failure to start
    control.send(json.dumps(missing).encode())
    control.settimeout(1)  # to see that the caller has gone, even if a fork of it holds the other end
    signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGCHLD])  # for `ended`
    gc.collect()
    gc.freeze()  # what a program makes itself can then be told from what was there: `run_script`
    testers = []
    while os.getppid() == caller:
        with contextlib.suppress(TimeoutError):
            message, fds, *_ = socket.recv_fds(control, 256, 4)
            if not message:
                break
            # Not JSON: every page that Z writes to is copied once per program, and JSON writes to many.
            numpy, timeout_s, memory_mb = marshal.loads(message)
            limits = timeout_s, memory_mb, own_filter
            if numpy and "numpy" not in sys.modules:  # the tests use it: 60 ms once, not in each T
                with contextlib.suppress(ImportError):
                    importlib.import_module("numpy")
                gc.freeze()
            result = judged_job(limits, testers, *fds) if len(fds) == 3 else script_job(limits, *fds)
            for fd in fds:
                os.close(fd)
            control.send(marshal.dumps(result))


# ---- The caller ---------------------------------------------------------------------------------------------

LIBRARIES = [os.path.dirname(os.__file__), f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64",
             "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime",
             "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]
# Imported, not run: to compile this file takes time, and leaves a larger heap for each fork to copy.
ZYGOTE = """import sys; sys.path[:] = [path for path in sys.path if path]; import json
config = json.loads(sys.argv[1]); sys.path.append(config["home"])
from sandbox import zygote; sys.path.pop(); zygote(config)"""
# 512 MiB of stack are for recursion through C code: sorted(key=...), lru_cache
SHELL = 'ulimit -S -s 524288 2>/dev/null || ulimit -S -s $(ulimit -H -s); exec "$@"'
WITHOUT = []  # protections to do without, for tests: "Landlock", "seccomp"
PROGRAM = {"code": None, "tests": "", "setup": "", "entry_point": None, "cases": [], "fn_name": None,
           "all_cases": False, "timeout_s": GRACE_S}
KNOWN_GOOD = [  # what each new worker has to run first
    {"code": "import _thread\n_thread.start_new_thread(print, ())\nprint(sum(map(int, input().split())))",
     "cases": [{"input": "1 2", "output": "3"}]},
    {"code": "def add(a, b): return a + b", "tests": "assert add(1, 2) == 3"}]


class Worker:
    """A zygote, used by one thread at a time."""

    live, idle, warned = [], [], False
    process = None  # of this worker, until it starts

    def start(self):
        if self not in Worker.live:  # it is new, or `close_workers` has ended it
            Worker.live.append(self)
        self.control, zygote_end = socket.socketpair()
        cores = sorted(os.sched_getaffinity(0))
        first = len(cores) * int(os.environ.get("LOCAL_RANK", 0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.core = cores[(first + Worker.live.index(self)) % len(cores)]
        packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        config = {"control": zygote_end.fileno(), "packages": packages, "core": self.core, "without": WITHOUT,
                  "home": os.path.dirname(os.path.abspath(__file__)), "readable": LIBRARIES + packages}
        environment = {"HOME": "/", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0",
                       "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2",
                       "LD_BIND_NOW": "1",  # or each C would look up the same symbols again
                       "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
        python = [sys.executable, "-s", "-S", "-X", "utf8", "-X", "zygote", "-c", ZYGOTE, json.dumps(config)]
        with zygote_end:
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", SHELL, "sh", *python], env=environment, cwd="/",
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                pass_fds=[zygote_end.fileno()], start_new_session=True)  # Ctrl-C is for the caller to handle
        self.control.settimeout(START_TIMEOUT_S)
        missing = self.control.recv(256)
        if not missing:
            said = self.process.communicate()[1].strip().rpartition("\n")[2]
            raise SandboxError(f"a worker did not start (exit status {self.process.returncode}): {said}")
        self.process.stderr.close()
        self.missing = json.loads(missing)
        for program in KNOWN_GOOD:
            verdict = self.run(PROGRAM | program, 1024)
            if not verdict["passed"]:
                raise SandboxError(f"a program that is right has failed: {verdict['reason']}")
        self.control.settimeout(None)
        if self.missing and not Worker.warned:
            Worker.warned = True
            print(f"sandbox: no {' and no '.join(self.missing)} here; see 'Not covered' in sandbox.py and use a "
                  "container", file=sys.stderr, flush=True)

    def close(self):
        """Whoever waits for this worker, in another thread, gets a SandboxError."""
        if self.process:
            self.process.kill()  # and the kernel kills C and T
            self.process.wait()
            self.control.close()

    def run(self, program, memory_mb):
        """-> verdict"""
        script = program["cases"] and not program["fn_name"]
        outcomes = (self.run_script if script else self.run_judged)(program, memory_mb)
        reason = next(filter(None, outcomes), "passed")[:300]
        verdict = {"passed": set(outcomes) == {None}, "reason": "".join(c if c.isprintable() else " " for c in reason)}
        if program["all_cases"]:
            verdict |= {"passed_cases": outcomes.count(None), "total_cases": len(program["cases"]) or 1}
        return verdict

    def job(self, program, memory_mb, *contents):
        """contents: of the files that Z, T and C get. -> why Z has ended the program or "", the exit status of T if
        there is one and of C, and what stands in the files that they write (all but the first two)"""
        fds = []
        try:
            for content in contents:
                fds.append(os.memfd_create("sandbox"))
                os.pwrite(fds[-1], content, 0)
            numpy = "numpy" in program["setup"] + program["tests"]
            socket.send_fds(self.control, [marshal.dumps((numpy, program["timeout_s"], memory_mb))], fds)
            answer = self.control.recv(256)
            if not answer:
                raise SandboxError("the worker died")
            why, *statuses = marshal.loads(answer)
            if "seccomp" not in self.missing and -signal.SIGKILL in statuses:
                raise SandboxError("a process was killed from outside, perhaps for want of memory")
            return why, statuses, [os.pread(fd, os.fstat(fd).st_size, 0) for fd in fds[2:]]
        finally:
            for fd in fds:
                os.close(fd)

    def run_script(self, program, memory_mb):
        """A stdin program: one run per case. -> for each case None or why it has failed"""
        outcomes = []
        for case in program["cases"]:
            given = as_bytes(program["code"]), as_bytes(case["input"])
            failure, (status,), written = self.job(program, memory_mb, *given, b"", b"")
            output, said = (text.decode(errors="replace") for text in written)
            if not failure and max(map(len, written)) >= OUTPUT_MB * MIB:
                failure = "output limit"
            elif not failure and status:
                failure = died(status, said[-4096:])
            elif not failure and not same_output(output, as_bytes(case["output"]).decode(errors="replace")):
                failure = "wrong answer"
            outcomes.append(failure or None)
            if failure and (failure == "timeout" or not program["all_cases"]):
                break
        return outcomes

    def run_judged(self, program, memory_mb):
        """Asserts and calls: C and T talk to each other. -> for each case None or why it has failed"""
        try:
            (tests, harmless), (setup, harmless_setup) = map(compile_tests, (program["tests"], program["setup"]))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return [f"exception: {type(error).__name__}: {error} (in the tests)"]
        called = set(re.findall(r"(?<![\w.])(\w+) *\(", program["tests"]))
        job = {**program, "code": None, "tests": tests, "setup": setup, "called": called,
               "harmless": harmless and harmless_setup}
        why, statuses, (verdict,) = self.job(program, memory_mb, as_bytes(program["code"]), marshal.dumps(job), b"")
        tester_status, status = statuses
        outcomes = [json.loads(line) for line in verdict.splitlines()]
        if why:
            outcomes.append(why)
        elif tester_status or not outcomes:
            outcomes.append(died(status if tester_status == GONE else tester_status))
        return outcomes


@functools.lru_cache(maxsize=64)  # the samples of a group share their tests
def compile_tests(source):
    """-> code, whether it is harmless"""
    code = compile(source, "tests", "exec", dont_inherit=True)
    return code, harmless(code)


def harmless(code):
    """Whether a test can change nothing that another test in the same process would see: it sets no attribute, and
    names no module but two that hold nothing changeable, no builtin that reaches other variables, no frame and nothing
    internal."""
    far_reaching = {"eval", "exec", "compile", "open", "vars", "globals", "locals", "getattr", "setattr", "delattr"}
    modules = sys.stdlib_module_names - {"math", "typing"} | {"numpy"}
    stores = {opcode.opmap["STORE_ATTR"], opcode.opmap["DELETE_ATTR"]}
    names = [part for name in code.co_names for part in name.split(".")]  # `from os.path import join`
    return (stores.isdisjoint(code.co_code[::2]) and (far_reaching | modules).isdisjoint(names)
            and not any(name.startswith(("_", "gi_", "cr_", "ag_")) for name in names)
            and all(harmless(part) for part in code.co_consts if isinstance(part, types.CodeType)))


def as_bytes(value):
    """Code, or a case's input or output: a text, a number, or a list of lines."""
    text = "\n".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.encode("utf-8", "surrogatepass")


def died(status, said=""):
    """Why a process ended by itself; `said`: the end of its stderr."""
    last_line = said.strip().rpartition("\n")[2]
    if status is None:
        return "hung up"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    if not last_line:
        return f"exited with status {status}"
    return "memory" if last_line.startswith("MemoryError") else f"exception: {last_line}"


def same_output(output, expected):
    """LiveCodeBench's rule: as many lines, with the same tokens (`same_token`)."""
    want = expected.strip().split("\n")
    got = output.strip().split("\n", len(want))  # no more pieces than that, however much was printed
    return len(got) == len(want) and all(map(same_line, got, want))


def same_line(got, want):
    want = want.split()
    got = got.split(None, len(want))
    return len(got) == len(want) and all(map(same_token, got, want))


def same_token(got, want):
    """As text, as decimals (3 = 3.0), or within 1e-6, absolute or relative, if both are written with a point."""
    if got == want:
        return True
    try:
        got_value, want_value = decimal.Decimal(got), decimal.Decimal(want)
        close = "." in got and "." in want and math.isclose(got_value, want_value, rel_tol=1e-6, abs_tol=1e-6)
        return close or got_value == want_value
    except decimal.InvalidOperation:
        return False


# ---- The machine --------------------------------------------------------------------------------------------


def cgroup_values(name):
    """What the files `name` of this process's control groups (versions 1 and 2) and of those above say."""
    with contextlib.suppress(OSError), open("/proc/self/cgroup") as lines:
        for _, controllers, path in (line.strip().split(":", 2) for line in lines):
            folder = "/sys/fs/cgroup/" + controllers
            for part in ["", *path.strip("/").split("/")]:
                folder = os.path.join(folder, part)
                with contextlib.suppress(OSError), open(os.path.join(folder, name)) as file:
                    yield file.read().split()


def usable_cores():
    """How many cores this rank may use: by affinity and the control group's quota, divided among the ranks."""
    quotas = [int(most) / int(period) for most, period in cgroup_values("cpu.max") if most != "max"]
    for most, period in zip(cgroup_values("cpu.cfs_quota_us"), cgroup_values("cpu.cfs_period_us")):
        quotas += [int(most[0]) / int(period[0])] if int(most[0]) > 0 else []
    cores = min([len(os.sched_getaffinity(0)), *quotas])
    return max(1, int(cores) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def machine_limits():
    """The limits of this machine that may have ended an honest program, in words."""
    limits = {"ulimit -v": "AS", "ulimit -f": "FSIZE", "ulimit -n": "NOFILE", "ulimit -t": "CPU", "ulimit -u": "NPROC"}
    found = [f"{name}: {resource.getrlimit(getattr(resource, f'RLIMIT_{kind}'))[1]}" for name, kind in limits.items()]
    for name in ("pids.max", "memory.max", "memory.limit_in_bytes"):
        found += [f"cgroup {name}: {value}" for value, in cgroup_values(name)]
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        found += [" ".join(line.split()) for line in lines if line.startswith("MemAvailable")]
    return "limits of this machine (-1 and max: none): " + "; ".join(found)


def run_tests(programs, timeout_s=6.0, memory_mb=1024, workers=None, all_cases=False):
    """Runs programs against their tests -> [{"passed": bool, "reason": text}].

    A program is a dict with "code" and one of
      "tests": source that asserts about names of the code; optional "setup" (trusted source that runs before; its names
          win over the code's) and "entry_point" (the name under test, which wins over the setup's);
      "cases": [{"input", "output"}], each a run of the code as a script: texts, numbers or lists of lines;
      "cases" and "fn_name", each a call of that function or method of `class Solution`: an input is a list of arguments
          or a text with a JSON value per line, an output is a value or, beside a text, its JSON text.
    Optional: "timeout_s", "all_cases" of its own. Other keys are ignored.

    timeout_s: of the whole of "tests", or of one case: CPU time, and time on the clock unless the machine is busy.
    all_cases: go on after a failed case, but not after a timeout; results have "passed_cases", "total_cases".
    memory_mb: address space. workers: 0 or None for one per core (`usable_cores`).
    reason: "passed", "wrong answer", "timeout", "memory", "threads", "output limit", "exception: ...", "exited with
    status ...", "killed by ...", "hung up" (it closed its pipes, or said too much) or "no tests" (nothing was asked).
    Equal programs run once. May be called from any thread; the workers stay for the next call. SandboxError when the
    machine, not a program, is at fault.
    """
    if sys.platform != "linux":
        raise SandboxError("programs run on Linux only; elsewhere use a container")
    keys, jobs = [], {}
    for place, program in enumerate(programs):
        if not isinstance(program.get("code"), str) or not ("tests" in program or "cases" in program):
            raise ValueError(f"program {place} needs 'code' and 'tests' or 'cases'")
        given = {key: program[key] for key in PROGRAM if program.get(key) is not None}
        program = PROGRAM | {"timeout_s": timeout_s, "all_cases": all_cases} | given
        try:
            keys.append(marshal.dumps(program, 2))
        except ValueError:
            raise ValueError(f"program {place} holds something that is not plain data") from None
        jobs[keys[-1]] = marshal.loads(keys[-1])  # a copy in which no two places share a list, as input and output may
    stopped = threading.Event()
    with ThreadPoolExecutor(max(1, min(workers or usable_cores(), len(jobs)))) as pool:
        try:
            verdicts = dict(zip(jobs, pool.map(lambda program: run_one(program, memory_mb, stopped), jobs.values())))
        except BaseException as error:  # Ctrl-C too
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            close_workers()  # what other threads run there is tried once more
            if isinstance(error, RuntimeError) and "new thread" in str(error):
                raise SandboxError(f"{error}; {machine_limits()}") from error
            raise
    return [dict(verdicts[key]) for key in keys]


def run_one(program, memory_mb, stopped):
    """-> verdict. Runs in a thread of its own; once more if something happens to the worker."""
    try:
        worker = Worker.idle.pop()
    except IndexError:
        worker = Worker()
    try:
        for retry in (True, False):
            try:
                if not worker.process or worker.process.poll() is not None:
                    worker.start()
                if stopped.is_set():  # while this worker started
                    raise SandboxError("interrupted")
                return worker.run(program, memory_mb)
            except (SandboxError, OSError) as fault:
                worker.close()
                if stopped.is_set() or not retry:
                    raise SandboxError(f"{fault}; {machine_limits()}") from fault
    finally:
        Worker.idle.append(worker)


def close_workers():
    """Ends all workers. Called at exit."""
    for worker in Worker.live:
        worker.close()
    Worker.live.clear()
    Worker.idle.clear()
