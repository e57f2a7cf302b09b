"""The sandbox against programs that cheat, attack or are merely unusual. Every row of a table is one program."""

# ruff: noqa: E501 - a program a row reads better than a wrapped one

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import sandbox
from sandbox import run_tests, same_output

ROOT = Path(sandbox.__file__).parent
LANDLOCK = sandbox.libc.syscall(444, None, 0, 1) >= 1
ASSERTS = "assert add(1, 2) == 3\nassert add(5, 7) == 12\nassert add(-4, 1) == -3"
CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(5, 7) == 12\n\ncheck(add)"
CALLS = [{"input": "1\n2", "output": "3"}, {"input": [5, 7], "output": 12}]
STDIN = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 7\n", "output": "12\n"}]
ADD = "def add(a, b):\n    return a + b\n"
LIAR = "class E:\n    def __eq__(self, o): return True\n"
EXCEPT = "try:\n    f(-1)\n    assert False\nexcept Bad: pass"


def styles(code):
    """The same program as each kind of test sees it."""
    return [{"code": code, "tests": ASSERTS}, {"code": code, "tests": CHECK, "entry_point": "add"},
            {"code": code, "cases": CALLS, "fn_name": "add"}]


def forged(message, then="os._exit(0)"):
    """A program that writes a message of its own to T when it is called."""
    return f"import os\ndef f(*args):\n    os.write(3, {message.encode()!r} + b'\\n'); {then}"


def descendants(pid):
    children = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ---- Cheats: programs that do not compute the answer and must not pass ------------------------------------------------

CHEATS = {
    "does nothing": "",
    "wrong": "def add(a, b): return a - b",
    "sys.exit at import": "import sys; sys.exit(0)",
    "os._exit at import": "import os; os._exit(0)",
    "os._exit in the call": "import os\ndef add(a, b): os._exit(0)",
    "KeyboardInterrupt in the call": "def add(a, b): raise KeyboardInterrupt",
    "StopIteration in the call": "def add(a, b): raise StopIteration",
    "AssertionError in the call": "def add(a, b): raise AssertionError",
    "exit from a thread": "import os, threading, time\nthreading.Thread(target=os._exit, args=(0,)).start()\n"
                          "def add(a, b): time.sleep(1); return 0",
    "exit from atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): raise SystemExit",
    "exit from a signal handler": "import os, signal\nsignal.signal(signal.SIGALRM, lambda *_: os._exit(0))\n"
                                  "signal.setitimer(signal.ITIMER_REAL, 0.01)\ndef add(a, b):\n    while True: pass",
    "exit from a generator": "import sys\ndef add(a, b):\n    yield 1\n    sys.exit(0)",
    "kills itself": "import os, signal\ndef add(a, b): os.kill(os.getpid(), signal.SIGKILL)",
    "aborts": "import os\ndef add(a, b): os.abort()",
    "crashes": "import ctypes\ndef add(a, b): ctypes.string_at(0)",
    "exec of true": "import os\nos.execv('/bin/true', ['true'])",
    "exec of a descriptor": "import os\nos.execve(os.open(os.__file__, os.O_RDONLY), ['true'], {})",
    "excepthook": "import sys, os\nsys.excepthook = lambda *args: os._exit(0)\ndef add(a, b): raise ValueError",
    "success printed": "print('passed'); print('OK', flush=True)\ndef add(a, b): print('passed'); return 0",
    "writes to every descriptor": """
        import os
        text = b'{"passed": true, "reason": "passed"}\\n[2, 2, null]\\n'
        message = text + b"\n"
        for fd in range(3, 300):
            for data in (text, message):
                try: os.write(fd, data)
                except OSError: pass
        def add(a, b): return 0""",
    "forged verdicts on the socket": """
        import json, os
        for value in (["value", True, []], [3, 3, None], {"passed": True}):
            os.write(3, json.dumps(value).encode() + b"\n")
        def add(a, b): return 0""",
    "answers before it is asked": """
        import json, os
        text = json.dumps(["value", 3, []]).encode()
        os.write(3, (text + b"\n") * 3)
        def add(a, b): return 3""",
    "frames": """
        import sys
        def add(a, b):
            frame = sys._getframe()
            while frame:
                for name, value in {**frame.f_globals, **frame.f_locals}.items():
                    if isinstance(value, list): value.append("passed")
                    if isinstance(value, dict) and "passed" in value: value["passed"] = True
                    if name in ("verdict", "passed", "result", "reason"): frame.f_locals[name] = True
                frame = frame.f_back
            return 0""",
    "every list and dict in memory": """
        import gc
        def add(a, b):
            for thing in gc.get_objects():
                try:
                    if isinstance(thing, list): thing.insert(0, None)
                    elif isinstance(thing, dict) and "reason" in thing: thing["reason"] = None
                except Exception: pass
            return 0""",
    "trace jumps over the assert": """
        import sys
        def trace(frame, event, arg):
            if event == "line":
                try: frame.f_lineno += 1
                except ValueError: pass
            return trace
        sys.settrace(trace)
        def add(a, b): return 0""",
    "builtins replaced": """
        import builtins
        class Lie:
            def __eq__(self, other): return True
            def __bool__(self): return True
        for name in ("abs", "all", "any", "bool", "len", "min", "max", "round", "sum", "int", "isinstance", "float"):
            setattr(builtins, name, lambda *args, **named: Lie())
        builtins.AssertionError = builtins.Exception = StopIteration
        def add(a, b): return 0""",
    "builtins as globals": "abs = all = any = len = round = isinstance = lambda *args: True\n"
                           "AssertionError = StopIteration\ndef add(a, b): return 0",
    "__builtins__ emptied": "__builtins__.clear() if isinstance(__builtins__, dict) else None\ndef add(a, b): return 0",
    "import hook": """
        import sys
        class Hook:
            def find_spec(self, *args): raise SystemExit(0)
        sys.meta_path.insert(0, Hook()); sys.modules.clear()
        def add(a, b): return 0""",
    "patched json and socket": """
        import json, socket, sys
        json.dumps = lambda *args, **named: '["value", true, []]'
        json.loads = lambda *args, **named: ["call", []]
        sys.modules["__main__"] = sys.modules["sandbox"] = None
        def add(a, b): return 0""",
    "equal to everything": LIAR + "    def __ne__(self, o): return False\ndef add(a, b): return E()",
    "unittest.mock.ANY": "from unittest.mock import ANY\ndef add(a, b): return ANY",
    "int that lies": "class I(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\n"
                     "    def __sub__(self, o): return 0\ndef add(a, b): return I(0)",
    "float that lies": "class F(float):\n    def __eq__(self, o): return True\n    def __sub__(self, o): return 0.0\n"
                       "def add(a, b): return F(0)",
    "bool of anything": "class B:\n    def __bool__(self): return True\n    def __eq__(self, o): return self\n"
                        "def add(a, b): return B()",
    "comparison that runs code": "class E:\n    def __eq__(self, o):\n        import os; os._exit(0)\n"
                                 "def add(a, b): return E()",
    "reduce": "class R:\n    def __reduce__(self): return eval, ('3',)\ndef add(a, b): return R()",
    "claims to be an int": "class C:\n    __class__ = int\n    def __eq__(self, o): return True\ndef add(a, b): return C()",
    "class that is equal": "class M(type):\n    def __eq__(cls, o): return True\n    __hash__ = type.__hash__\n"
                           "class C(metaclass=M): pass\ndef add(a, b): return C",
    "names a class like a plain one": "class Fraction:\n    numerator = denominator = 3\n"
                                      "    def __eq__(self, o): return True\ndef add(a, b): return Fraction()",
    "contains everything": "class L(list):\n    def __contains__(self, o): return True\n"
                           "    def __eq__(self, o): return True\ndef add(a, b): return L()",
    "says it is numpy": "class A:\n    __module__ = 'numpy'\n    def tolist(self): return self\n"
                        "    def __eq__(self, o): return True\nA.__module__ = 'numpy'\ndef add(a, b): return A()",
    "not a number": "def add(a, b): return float('nan')",
    "near miss in type": "def add(a, b): return str(a + b)",
    "near miss in shape": "def add(a, b): return [a + b]",
    "the function is the answer": "def add(a, b): return add",
    "generator of the answer": "def add(a, b): yield a + b",
    "stdout closed": "import os, sys\nsys.stdout.close(); sys.stderr.close(); os.close(0)\ndef add(a, b): return 0",
    "all descriptors closed": "import os\nos.closerange(0, 300)\n" + ADD,
    "socket replaced": "import os\nos.dup2(os.open('/dev/zero', os.O_RDONLY), 3)\n" + ADD,
    "answers much": "def add(a, b): return 'x' * (1 << 25)",
    "answers without end": "import os\ndef add(a, b):\n    while True: os.write(3, b'[' * 65536)",
    "half a message": "import os\ndef add(a, b):\n    os.write(3, b'[\"value\"'); return 0",
    "deep answer": "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "answer with a cycle": "def add(a, b):\n    x = []; x.append(x); return x",
    "huge int": "def add(a, b): return 1 << 10**7",
    "sends itself a deep message": "import os\ndef add(a, b):\n    text = b'[' * 10**6\n"
                                   "    os.write(3, text + b'\\n'); return 0",
}
# Cheats that need a certain test: (code, test)
CHEATS_OF_TESTS = {
    "true math": ("import sys, math\nmath.isclose = lambda *a, **k: True\nclass math: isclose = lambda *a: True\n"
                  "def add(a, b): return 0.0", "assert math.isclose(add(1, 2), 3.0)"),
    "true abs": ("abs = lambda x: 0\ndef add(a, b): return 0", "assert abs(add(1, 2) - 3) < 1e-9"),
    "object in abs": ("class Z:\n    def __sub__(self, o): return 0\ndef add(a, b): return Z()",
                      "assert abs(add(1, 2) - 3) < 1e-9"),
    "true set": ("class set:\n    def __init__(self, x): pass\n    def __eq__(self, o): return True\n"
                 "def add(a, b): return []", "assert set(add(1, 2)) == set([3])"),
    "true sorted": ("sorted = lambda x: [1, 2, 3]\ndef add(a, b): return []", "assert sorted(add(1, 2)) == [1, 2, 3]"),
    "true random": ("import random\nrandom.randint = lambda *a: 1\ndef add(a, b): return 2",
                    "import random\nfor _ in range(50):\n    x = random.randint(0, 9)\n    assert add(x, 1) == x + 1"),
    "true unittest": ("import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef add(a, b): return 0",
                      "import unittest\nunittest.TestCase().assertEqual(add(1, 2), 3)"),
    "true numpy": ("import numpy\nnumpy.allclose = lambda *a, **k: True\ndef add(a, b): return 0.0",
                   "import numpy as np\nassert np.allclose(add(1, 2), 3.0)"),
    "numpy array from nowhere": (
        "class A:\n    def __array__(self, *a, **k):\n        import numpy; return numpy.array(3)\n"
        "    __array_interface__ = {'version': 3, 'typestr': '|u1', 'shape': (1,), 'data': (id(0), True)}\n"
        "    def __float__(self): return 3.0\n    def __eq__(self, o): return True\ndef add(a, b): return A()",
        "import numpy as np\nassert np.array_equal(np.asarray(add(1, 2)), np.asarray(3))"),
    "StopIteration ends all()": ("def add(a, b): raise StopIteration",
                                 "assert all(map(lambda x: add(x, 1) == x + 1, [1, 2]))"),
    "startswith of an object": ("class S:\n    def startswith(self, x): return True\ndef add(a, b): return S()",
                                "assert add('a', 'b').startswith('a')"),
    "namedtuple with the methods of a text": (
        "import collections\ndef add(a, b): return collections.namedtuple('P', 'isdigit startswith')(callable, lambda x: True)",
        "assert add('1', '2').startswith('12')"),
    "namedtuple whose names are one text": ("class P(tuple): _fields = 'isdigit'\ndef f(): return P([callable])",
                                            "assert f().isdigit(len)"),
    "namedtuple with an object for a name": (
        "class N:\n    def __str__(self): return 'isdigit'\nclass P(tuple): _fields = (N(),)\n"
        "def f(): return P([lambda: True])", "assert f().isdigit()"),
    "namedtuple with the methods of a set": ("import collections\ndef f(): return collections.namedtuple('P', 'issubset')(lambda x: True)",
                                             "assert f().issubset({1, 2})"),
    "object with the hash of the answer": ("class H:\n    def __hash__(self): return 3\n    def __eq__(self, o): return True\n"
                                           "def add(a, b): return H()", "assert add(1, 2) in {3} or {3: 1}.get(add(1, 2))"),
    "isdigit of an object": ("class S:\n    isdigit = lambda self: True\ndef add(a, b): return S()",
                             "assert add('1', '2').isdigit()"),
    "object in a list": (LIAR + "def add(a, b): return E()", "assert add(1, 2) in [3, 4]"),
    "list in an object": ("class E:\n    def __contains__(self, o): return True\n    def __iter__(self): return self\n"
                          "    def __next__(self): raise StopIteration\ndef add(a, b): return E()",
                          "assert 3 in add(1, 2)"),
    "objects in a dict": ("class E:\n    __hash__ = lambda s: hash('k')\n    def __eq__(self, o): return True\n"
                          "def add(a, b): return {E(): 3}", "assert add(1, 2) == {'k': 3}"),
    "greater than everything": ("class G:\n    __gt__ = __lt__ = __ge__ = __le__ = lambda s, o: True\n"
                                "def add(a, b): return G()", "assert 2 < add(1, 2) < 4"),
    "isinstance": ("class I:\n    __class__ = int\n    def __eq__(self, o): return True\ndef add(a, b): return I()",
                   "assert isinstance(add(1, 2), int) and add(1, 2) == 3"),
    "endless iterator": ("import itertools\ndef add(a, b): return itertools.count()", "assert list(add(1, 2)) == [3]"),
    "test's own catch-all": ("import os\ndef add(a, b): os._exit(0)",
                             "try:\n    ok = add(1, 2) == 3\nexcept:\n    ok = True\nassert ok"),
    "no such name, caught": ("", "try:\n    assert add(1, 2) == 3\nexcept NameError:\n    raise"),
    "helper of the prompt": ("def twice(x): return 6\ndef add(a, b): return 3", "assert twice(add(1, 3)) == 8",
                             "def twice(x): return 2 * x"),
    "builtin under test": ("def sum(a, b): return 0", "assert sum(1, 2) == 3"),
    # what changes in place: only if the call returned None
    "emptied, and an empty list returned": ("def f(x):\n    x.clear(); return []",
                                            "a = [3, 1, 2]\nassert f(a) == sorted(a)"),
    "emptied, then raised": ("def f(x):\n    x.clear(); raise ValueError",
                             "a = [3, 1]\ntry: f(a)\nexcept ValueError: pass\nassert a == []"),
    "emptied by a generator": ("def f(x):\n    x.clear(); yield from []", "a = [3, 1]\nassert list(f(a)) == sorted(a)"),
    "list becomes a liar": ("class L(list):\n    def __eq__(self, o): return True\ndef f(x): x[:] = [L([9])]",
                            "a = [[1]]\nf(a)\nassert a == [[1, 2]]"),
    "list holds a liar": (LIAR + "def f(x): x[:] = [E(), E()]", "a = [2, 1]\nf(a)\nassert a == [1, 2]"),
    "dict holds a liar": ("class E:\n    __hash__ = lambda s: 0\n    def __eq__(self, o): return True\n"
                          "def f(x): x[E()] = 1", "a = {}\nf(a)\nassert a == {0: 1}"),
    "the expected list, by number": ("""import json
def f(x):
    import gc
    for p in gc.get_objects():
        if type(p).__name__ == "Candidate": p.shown[:] = [[1, 2]] * 9; p.numbers.clear()
    return 3""", "want = [1, 2]\nassert f([2, 1]) == want"),
    "emptied, though a list is returned": (forged('["value", ["list"], [0, ["list"]]]'), "a = [3, 1]\nassert f(a) == sorted(a)"),
    "list becomes a number": (forged('["value", null, [0, 7]]'), "a = [2, 1]\nf(a)\nassert a == 7"),
    "list becomes a liar's": (forged('["value", null, [0, ["mine", 0]]]'), "a = [2, 1]\nf(a)\nassert a == [1, 2]"),
    # callbacks and iterators
    "callback with a liar": (LIAR + "    __lt__ = __gt__ = __eq__\ndef f(g): return g(E())",
                             "assert f(lambda x: x == 3) is True"),
    "callback that raises is an answer": ("def f(g):\n    try: g(0)\n    except BaseException: pass\n    return 0",
                                          "def g(x): assert x\nassert f(g) == 1"),
    "evaluates by a callback": ("def f(g): return g('__import__(\"sys\").exit(0)') or g('globals().update(want=0)')",
                                "want = 1\nassert f(eval) == want"),
    "frames of a callback": ("def f(g):\n    for n in ('__globals__', '__code__', '__closure__'):\n"
                             "        try: getattr(g, n)['want'] = 0\n        except Exception: pass\n    return 0",
                             "want = 1\ndef g(): return want\nassert f(g) == g()"),
    "numbers that were never handed out": (forged('["call", [5], {}]', "os.read(3, 999); return 0"), "assert f(lambda: 1) == 1"),
    "requests that T does not take": (forged('["getattr", [0, "__globals__"], {}]', "os.read(3, 999); return 0"), "assert f(lambda: 1) == 1"),
    "StopIteration in a callback's answer": ("def f(g):\n    g(1)\n    raise StopIteration",
                                             "assert all(map(lambda v: f(lambda x: x) == v, [1]))"),
    "endless calls of a callback": ("def f(g):\n    while True: g(1)", "assert f(lambda x: x) == 1"),
    "callbacks without end inside each other": ("def f(g): return g(f)", "def g(h): return h(g)\nassert f(g) == 1"),
    "iterator emptied": ("def f(it): list(it); return []", "it = iter([1, 2])\nassert f(it) == [1, 2]"),
    # exceptions and classes
    "except catches the test's assert": ("Bad = AssertionError\ndef f(x): return x", EXCEPT),
    "except catches everything": ("Bad = Exception\ndef f(x): return x", EXCEPT),
    "except catches a tuple": ("Bad = (ValueError, AssertionError)\ndef f(x): return x", EXCEPT),
    "except catches by inheritance": ("class M(type):\n    def mro(c): return [c, AssertionError, Exception, BaseException, object]\n"
                                      "    def __instancecheck__(c, o): return True\n    __subclasscheck__ = __instancecheck__\n"
                                      "class Bad(Exception, metaclass=M): pass\ndef f(x): return x",
                                      EXCEPT),
    "a class named AssertionError": ("class AssertionError(Exception): pass\ndef f(x): return x",
                                     "try:\n    f(-1)\n    raise AssertionError\nexcept Exception as e:\n    assert e.args"),
    "skips the test": ("import unittest\ndef f(x): raise unittest.SkipTest('no')",
                       "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)\n"
                       "r = unittest.TestResult()\nunittest.defaultTestLoader.loadTestsFromTestCase(T).run(r)\n"
                       "assert r.wasSuccessful() and not r.skipped"),
    "skips the test, by another module's name for it": (
        forged('["error", ["exception", 5, "SkipTest", "numpy.testing", ["named", "builtins", "Exception"]], ["tuple"], ["dict", ["list"], ["list"]]]'),
        "import unittest, numpy.testing\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)\n"
        "r = unittest.TestResult()\nunittest.defaultTestLoader.loadTestsFromTestCase(T).run(r)\nassert r.wasSuccessful()"),
    "exits by its own exception": ("class Bad(SystemExit): pass\ndef f(x): raise Bad(0)", "assert f(1) == 1"),
    "an int that is an instance of everything": ("class M(type):\n    def __instancecheck__(c, o): return True\n"
                                                 "class A(metaclass=M): pass\ndef f(): return 3",
                                                 "assert isinstance(f(), A)"),
    "isinstance of a built-in, of an object": ("class A:\n    __class__ = int\ndef f(): return A()",
                                               "assert isinstance(f(), int)"),
    "exception that is equal": ("class Bad(Exception):\n    def __eq__(s, o): return True\n    __str__ = lambda s: 'no'\n"
                                "def f(x): raise Bad('no')",
                                "try:\n    f(1)\nexcept Exception as e:\n    assert e == 3 or str(e) == 'yes'"),
    # operators: never with plain data
    "plus": ("class V:\n    __add__ = __radd__ = lambda s, o: 3\ndef f(): return V()", "assert f() + 1 == 3"),
    "minus in abs": ("class V:\n    __sub__ = __rsub__ = __abs__ = lambda s, *o: 0\ndef f(): return V()",
                     "assert abs(f() - 3) < 1e-6"),
    "less than": ("class V:\n    __lt__ = __gt__ = __le__ = __ge__ = lambda s, o: True\ndef f(): return V()",
                  "assert f() <= 3 <= f()"),
    "sum of liars": ("class V:\n    __add__ = __radd__ = lambda s, o: 6\ndef f(): return V()",
                     "assert sum([f(), f()]) == 6"),
    "sorted with plain data": ("class V:\n    __lt__ = __gt__ = lambda s, o: True\n    __eq__ = lambda s, o: True\n"
                               "def f(): return [V(), 1]", "assert sorted(f()) == [1, 2]"),
    # arrays and other classes
    "array of liars": ("import numpy as np\nclass E:\n    def __eq__(self, o): return True\n"
                       "def f(): return np.array([E(), E()], object)", "import numpy as np\n"
                       "assert np.array_equal(f(), [1, 2])"),
    "subclass of an array": ("import numpy as np\nclass A(np.ndarray):\n    def __eq__(self, o): return True\n"
                             "def f(): return np.zeros(2).view(A)", "assert f().tolist() == [1, 2]"),
    "array of addresses": (forged('["value", ["numpy.ndarray", "|O", ["tuple", 1], ["list", 3]], []]'), "assert f()[0] == 3"),
    "array of nothing, huge": (forged('["value", ["numpy.ndarray", "<f8", ["tuple", 100000000000], ["list"]], []]'), "assert f().sum() == 0"),
    "Counter that lies": ("import collections\nclass C(collections.Counter):\n    def __eq__(self, o): return True\n"
                          "def f(): return C()", "assert f() == {'a': 1}"),
    "namedtuple that lies": ("import collections\nclass P(collections.namedtuple('P', 'x')):\n"
                             "    def __eq__(self, o): return True\ndef f(): return P(0)", "assert f() == (1,)"),
    "namedtuple with code in a name": ("""class P(tuple):
    _fields = ('x=__import__("os")._exit(0)',)
def f(): return P([1])""", "assert f() == (1,)"),
    "a module by name": (forged('["value", ["named", "os", "_exit"], []]'), "assert f()(0) == 1"),
    "a built-in function by name": (forged('["value", ["named", "builtins", "exit"], []]'), "assert f()(0) == 1"),
    "another time zone": ("from datetime import datetime, timezone, timedelta\n"
                          "def f(): return datetime(2020, 1, 1, tzinfo=timezone(timedelta(hours=5)))",
                          "import datetime as d\nassert f() == d.datetime(2020, 1, 1, tzinfo=d.timezone.utc)"),
    "nothing is called: a test function": ("def f(x): return 0", "def test_f():\n    assert f(1) == 2"),
    "nothing is called: a TestCase": ("def f(x): return 0", "import unittest\nclass T(unittest.TestCase):\n"
                                      "    def test(self): self.assertEqual(f(1), 2)"),
    "nothing is called: a main guard": ("def f(x): return 0", "if __name__ == '__main__':\n    assert f(1) == 2"),
    "nothing is called: comments": ("def f(x): return 0", "# assert f(1) == 2"),
    "nothing is called: a name": ("def f(x): return 0", "candidate = f"),
    "helper of the prompt, redefined": ("def encode(s): return ''\ndef decode(s): return ''",
                                        "def check(c):\n    for s in ('ab', 'c'): assert c(encode(s)) == s\ncheck(decode)",
                                        "def encode(s): return s[::-1]\ndef decode(s): pass", "decode"),
    "leaves a trap for the next test": ("import builtins, math\nbuiltins.abs = math.isclose = None\n"
                                        "def add(a, b): return 0", "assert abs(add(1, 2)) == 3"),
}
# A program that ends itself as only the machine should: it has failed, and no error is raised
SELF_KILL = {
    "SIGKILL": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "SIGKILL to a thread": "import signal, threading\nsignal.pthread_kill(threading.get_ident(), signal.SIGKILL)",
    "a limit on its CPU time": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass",
    "a signal that cannot be ignored": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
}
# Cheats of stdin programs
CHEATS_STDIN = {
    "prints nothing": "",
    "exits 0": "import os; os._exit(0)",
    "more tokens": "a, b = map(int, input().split()); print(a + b); print(a + b)",
    "two lines for one": "a, b = map(int, input().split()); print(); print(a + b); print('')\nprint(a + b)",
    "all answers": "print('3 12')",
    "float for an int": "a, b = map(float, input().split()); print(a + b + 1e-5)",
    "right, then exits 1": "import sys\nprint(sum(map(int, input().split()))); sys.exit(1)",
    "right, then raises": "print(sum(map(int, input().split()))); raise ValueError('late')",
    "right, then exits with a text": "import sys\nprint(sum(map(int, input().split()))); sys.exit('bad')",
    "right, then crashes": "import os\nprint(sum(map(int, input().split())), flush=True); os.abort()",
    "right, atexit fails it": "import atexit, os\natexit.register(os._exit, 3)\nprint(sum(map(int, input().split())))",
    "right, on stderr": "import sys\nprint(sum(map(int, input().split())), file=sys.stderr)",
    "right, after its descriptors are closed": "import os\nos.closerange(3, 99); a = sum(map(int, input().split()))\n"
                                               "while True: pass\nprint(a)",
    "right, stdout closed": "import sys\nsys.stdout.close(); print(sum(map(int, input().split())))",
    "to every descriptor": "import os\nfor fd in range(300):\n    try: os.write(fd, b'12\\n')\n    except OSError: pass",
    "looks for the expected output": """
        import glob, os
        text = input()
        for fd in range(300):
            try: data = os.pread(fd, 1 << 16, 0)
            except OSError: continue
            if data and data.decode() != text + "\\n": print(data.decode())
        for path in glob.glob("/proc/self/fd/*") + glob.glob("/proc/*/fd/*") + glob.glob("/dev/fd/*"):
            try: data = open(path).read()
            except OSError: continue
            if data != text + "\\n": print(data)""",
}

# ---- Attacks: each sets `hit` if it gets through, and answers rightly only then ---------------------------------------

ATTACKS = {
    "environment": "hit = 'SANDBOX_TEST_SECRET' in os.environ",
    "environment of itself": "hit = b'SECRET' in open('/proc/self/environ', 'rb').read()",
    "environment of the caller": "hit = b'' != open('/proc/@PID@/environ', 'rb').read()",
    "memory of the caller": "hit = bool(open('/proc/@PID@/mem', 'rb'))",
    "own memory": "hit = bool(open('/proc/self/mem', 'r+b'))",
    "descriptors of the caller": "hit = bool(os.listdir('/proc/@PID@/fd'))",
    "descriptors of the tester": """
        for pid in range(os.getppid() - 50, os.getppid() + 50):
            for fd in range(20):
                try: os.readlink(f"/proc/{pid}/fd/{fd}"); hit = hit or pid != os.getpid()
                except OSError: pass""",
    "a file outside": "hit = bool(open('@FILE@').read())",
    "a folder outside": "hit = bool(os.listdir('@DIR@'))",
    "this repository": f"hit = bool(open({str(ROOT / 'sandbox.py')!r}).read())",
    "other processes": "hit = bool(os.listdir('/proc'))",
    "write outside": "hit = bool(open('@FILE@', 'w'))",
    "create outside": "hit = bool(open('@DIR@/new', 'w'))",
    "create in tmp": "hit = bool(open('/tmp/sandbox_test_new', 'w'))",
    "open to read, and truncate": "hit = bool(os.open('@FILE@', os.O_RDONLY | os.O_TRUNC))",
    "open the library to read, and truncate": "hit = bool(os.open(os.__file__, os.O_RDONLY | os.O_TRUNC))",
    "write the library": "hit = bool(open(os.__file__, 'a'))",
    "delete": "os.remove('@FILE@'); hit = True",
    "rename": "os.rename('@FILE@', '@FILE@.old'); hit = True",
    "temporary file": "import tempfile; hit = bool(tempfile.TemporaryFile())",
    "fork": "pid = os.fork(); hit = True\nif not pid: os._exit(0)",
    "raw clone": "pid = libc.syscall(56, 17, 0, 0, 0, 0); hit = pid > 0\nif not pid: os._exit(0)",
    "subprocess": "import subprocess; subprocess.Popen(['true']); hit = True",
    "kill the caller": "os.kill(@PID@, 0); hit = True",
    "kill the parent": "os.kill(os.getppid(), 0); hit = True",
    "kill the tester": "for pid in range(os.getppid() + 1, os.getpid()):\n"
                       "    try: os.kill(pid, 0); hit = True\n    except OSError: pass",
    "kill everything": "os.kill(-1, 0); hit = True",
    "tgkill": "hit = libc.syscall(234, @PID@, @PID@, 0) == 0",
    "signal by F_SETOWN": "import fcntl; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, @PID@); hit = True",
    "signal by F_SETSIG": "import fcntl; r, w = os.pipe(); fcntl.fcntl(r, 10, 9); hit = True",
    "signal by FIOSETOWN": "import fcntl, socket, struct\n"
                           "fcntl.ioctl(socket.socketpair()[0], 0x8901, struct.pack('i', @PID@)); hit = True",
    "limits of the caller": "import resource; resource.prlimit(@PID@, resource.RLIMIT_CPU); hit = True",
    "its own limits": "import resource\nhard = resource.getrlimit(resource.RLIMIT_AS)[1]\n"
                      "resource.setrlimit(resource.RLIMIT_AS, (2 * hard, 2 * hard)); hit = True",
    "no limit on memory": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1)); hit = True",
    "survive the zygote": "hit = libc.prctl(1, 0, 0, 0, 0) == 0",
    "be dumpable": "hit = libc.prctl(4, 1, 0, 0, 0) == 0",
    "another filter": "hit = libc.prctl(22, 1, 0, 0, 0) == 0",
    "terminal input": "import fcntl; fcntl.ioctl(0, 0x5412, b'x'); hit = True",
    "datagrams to any name": "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); hit = True",
    "files on their way, which count for all": "import array, socket; a, b = socket.socketpair()\n"
                                               "a.sendmsg([b'x'], [(1, 1, array.array('i', [3] * 250))]); hit = True",
    "reconnect the socket pair": "import socket; a, b = socket.socketpair(); a.connect('\\0x'); hit = True",
    "test in the heap": """
        head, tail = b"marker", b"_1538"  # in one piece only in the tests
        r, w = os.pipe()
        for address in range(id([]) - (24 << 20) & ~4095, id([]) + (24 << 20), 4096):
            if libc.write(w, ctypes.c_void_p(address), 4096) == 4096:  # says EFAULT where nothing is
                hit = any(part.endswith(head) for part in os.read(r, 4096).split(tail)[:-1]) or hit""",
    "test in the frames": """
        import sys
        frame = sys._getframe()
        while frame:
            hit = hit or "8351_rekram"[::-1] in repr({**frame.f_globals, **frame.f_locals})
            frame = frame.f_back""",
}
ATTACK = """
import ctypes, os
libc, hit = ctypes.CDLL(None), False
try:
{body}
except BaseException as error:
    pass
def add(a, b):
    return a + b if hit else None
if __name__ == "__main__":
    a, b = map(int, input().split())
    print(a + b if hit else 'no')
"""

# ---- Bombs: what a program may use is limited, and the reason is said -------------------------------------------------

BOMBS = {  # name: (reason, code run at import)
    "loop": ("timeout", "while True: pass"),
    "loop that swallows everything": ("timeout", """
        while True:
            try:
                while True: pass
            except BaseException: pass"""),
    "sleep": ("timeout", "import time; time.sleep(60)"),
    "flood where nobody reads": ("timeout", """
        import sys
        while True: print('x' * 4096); sys.stderr.write('x' * 4096)"""),
    "fork bomb": ("exception: PermissionError", "import os\nwhile True: os.fork()"),
    "signals ignored": ("timeout", """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: signal.sigtimedwait([signal.SIGUSR1], 1)"""),
    "stops itself": ("timeout", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"),
    "regular expression": ("timeout", "import re; re.match('(a+)+$', 'a' * 64 + 'b')"),
    "thread that never ends": ("timeout", "import threading, time\n"
                                          "threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)"),
    "memory": ("memory", "x = bytearray(1 << 40)"),
    "memory, piecewise": ("memory", "x = []\nwhile True: x.append(bytearray(1 << 24))"),
    "memory, mmap": ("exception: OSError", "import mmap\nx = [mmap.mmap(-1, 1 << 28) for _ in range(99)]"),
    "threads": ("threads", "import threading, time\nthreading.stack_size(32768)\n"
                           "while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"),
    "endless recursion": ("exception: RecursionError", "def f(): f()\nf()"),
    # ctypes ignores an exception in a callback: if there was no memory before the stack's end, f comes back
    "stack": (("killed by SIGSEGV", "memory"), "import ctypes\nf = ctypes.CFUNCTYPE(None)(lambda: f())\nimport sys\n"
                                               "sys.setrecursionlimit(10**9)\nf()\nraise MemoryError"),
    "syntax": ("exception: SyntaxError", "def add(a, b) return"),
    "NUL": ("exception: ", "x = '\0'"),
    "half a surrogate": ("exception: ", "x = '\ud800'"),
    "nested brackets": ("exception: ", "(" * 10**5),
}
BOMBS_STDIN = {
    "flood": ("output limit", "while True: print('x' * 4096)"),
    "flood, errors swallowed": ("output limit", """
        import time
        for _ in range(20000):
            try: print('x' * 4096)
            except OSError: break
        import os; os._exit(0)"""),
    "flood of stderr": ("output limit", "import sys\nwhile True: sys.stderr.write('x' * 65536)"),
    "waits for more input": ("exception: EOFError", "input(); input(); input()"),
    "raises": ("exception: ValueError: no", "raise ValueError('no')"),
    "exits 7": ("exited with status 7", "import sys; sys.exit(7)"),
    "wrong": ("wrong answer", "print(4)"),
}

# ---- Honest programs --------------------------------------------------------------------------------------------------

HONEST = {  # name: (code, tests)
    "main": (ADD + "if __name__ == '__main__':\n    print(add(int(input()), 2))", ASSERTS),
    "check": (ADD, CHECK),
    "deep recursion": ("import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)",
                       "assert f(50000) == 50000"),
    "deep recursion in C": ("import sys, functools\nsys.setrecursionlimit(10**6)\n"
                            "@functools.lru_cache(None)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)",
                            "assert f(20000) == 20000" if sys.version_info < (3, 12) else "assert f(300) == 300"),
    "recursion in a thread": ("import sys, threading\nsys.setrecursionlimit(10**6); threading.stack_size(1 << 27)\n"
                              "def g(n): return 0 if n == 0 else 1 + g(n - 1)\ndef f(n):\n    r = []\n"
                              "    t = threading.Thread(target=lambda: r.append(g(n))); t.start(); t.join()\n"
                              "    return r[0]", "assert f(20000) == 20000"),
    "threads": ("from concurrent.futures import ThreadPoolExecutor\ndef f(n):\n"
                "    with ThreadPoolExecutor(16) as pool: return sum(pool.map(lambda x: x * x, range(n)))",
                "assert f(100) == 328350"),
    "asyncio": ("import asyncio\nasync def g(x):\n    await asyncio.sleep(0.01); return x\n"
                "def f(n):\n    async def h(): return await asyncio.gather(*map(g, range(n)))\n"
                "    return sum(asyncio.run(h()))", "assert f(10) == 45"),
    "signals": ("import signal, os\nseen = []\nsignal.signal(signal.SIGUSR1, lambda *a: seen.append(1))\n"
                "def f():\n    os.kill(os.getpid(), signal.SIGUSR1); return seen", "assert f() == [1]"),
    "standard library": ("import argparse, bisect, collections, csv, datetime, decimal, email, enum, fractions, gzip,hashlib, heapq, html, http, inspect, itertools, json, logging, math, multiprocessing,operator, pathlib, pickle, queue, random, re, sqlite3, statistics, string, subprocess,tempfile, threading, time, typing, unittest, urllib.request, uuid, xml.dom, zlib\n"
                         "def f(): return hashlib.sha256(b'x').hexdigest()[:8], len(str(uuid.uuid4()))",
                         "assert f() == ('2d711642', 36)"),
    "numpy": ("import numpy as np\ndef f(n): return np.arange(n) ** 2, np.float64(2), np.bool_(True), np.int64(3)",
              "a, *rest = f(4)\nassert a.tolist() == [0, 1, 4, 9] and a.shape == (4,) and rest == [2.0, True, 3]"),
    "numpy in the test": ("def f(n): return [x / 10 for x in range(n)]",
                          "import numpy as np\nassert np.allclose(f(3), np.array([0, 0.1, 0.2]))"),
    "dev null": ("import contextlib, os\ndef f():\n    with open(os.devnull, 'w') as o, contextlib.redirect_stdout(o):\n"
                 "        print('x')\n    return 1", "assert f() == 1"),
    "prints a lot": ("def f(n):\n    for _ in range(n): print('x' * 100)\n    return n", "assert f(100000) == 100000"),
    "large data": ("def f(x): return [v + 1 for v in x], {str(v): v for v in x}",
                   "r = f(list(range(100000)))\nassert r[0][-1] == 100000 and r[1]['7'] == 7"),
    "long text": ("def f(s): return s[::-1]", "assert f('ab' * 10**6) == 'ba' * 10**6"),
    "unicode": ("def größe(s): return s.upper() + '😀\\u0000'", "assert größe('straße') == 'STRASSE😀\\u0000'"),
    "encoding line": ("# -*- coding: utf-8 -*-\ndef f(): return 'é'", "assert f() == 'é'"),
    "windows lines": (ADD.replace("\n", "\r\n"), ASSERTS),
    "future import": ("from __future__ import annotations\n" + ADD, ASSERTS),
    "surrogate in the answer": ("def f(): return '\\ud800'", "assert f() == '\\ud800'"),
    "every plain type": ("import collections as c, datetime as d, decimal, fractions\ndef f(x): return x\n"
                         "def g(): return [c.deque([1]), c.Counter('aab'), c.OrderedDict(a=1), c.defaultdict(int, b=2),decimal.Decimal('1.10'), fractions.Fraction(1, 3), d.date(2020, 1, 2),d.datetime(2020, 1, 2, 3, 4, 5, 6), d.time(1, 2), d.timedelta(1, 2), 1j, range(3), b'\\xff',{1, 2}, frozenset([3]), (1,), None, True, float('inf'), 2**99, -2**20000]",
                         "import collections as c, datetime as d, decimal, fractions\n"
                         "want = [c.deque([1]), {'a': 2, 'b': 1}, {'a': 1}, {'b': 2}, decimal.Decimal('1.10'),fractions.Fraction(1, 3), d.date(2020, 1, 2), d.datetime(2020, 1, 2, 3, 4, 5, 6), d.time(1, 2),d.timedelta(1, 2), 1j, range(3), b'\\xff', {1, 2}, frozenset([3]), (1,), None, True,float('inf'), 2**99, -2**20000]\n"
                         "assert g() == want\nassert f(want) == want\n"
                         "assert [type(v) for v in f(want)] == [type(v) for v in want]"),
    "subclasses": ("import enum, collections\nP = collections.namedtuple('P', 'x y')\n"
                   "class E(enum.IntEnum):\n    A = 5\nclass S(str): pass\ndef f(): return P(1, 2), E.A, S('s')",
                   "assert f() == ((1, 2), 5, 's')"),
    "in place": ("def f(x): x.sort()\ndef g(m):\n    for row in m: row.reverse()\ndef h(d, s, q): d.clear(); s.add(1); q.append(2)\n"
                 "class K:\n    def f(self, x): x.append(self)",
                 "import collections\na = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]\nm = [[1, 2], [3, 4]]\ng(m)\n"
                 "assert m == [[2, 1], [4, 3]]\nd, s, q = collections.defaultdict(int, {1: 2}), set(), collections.deque()\nh(d, q=q, s=s)\n"
                 "assert (d, s, q) == ({}, {1}, collections.deque([2]))\nk, z = K(), []\nk.f(z)\nassert z[0] == k"),
    "in place, an array": ("def f(a): a.sort()", "import numpy as np\na = np.array([2, 1])\nf(a)\nassert a.tolist() == [1, 2]"),
    "callbacks": ("def f(g, xs): return [g(v) for v in xs]\ndef twice(g): return lambda x: g(g(x))\n"
                  "def g(key, xs): return sorted(xs, key=key)\ndef h(fill):\n    x = []\n    fill(x)\n    return x",
                  "import operator, functools\nassert f(lambda v: v + 1, [1]) == [2]\nassert twice(lambda x: x * 2)(3) == 12\n"
                  "assert f(str.upper, ['a']) == ['A'] and f(len, ['ab']) == [2] and f(operator.neg, [1]) == [-1]\n"
                  "assert g(lambda v: -v, [1, 2]) == [2, 1] and f(functools.partial(int, base=2), ['11']) == [3]\n"
                  "seen = []\nassert f(seen.append, [1, 2]) == [None, None] and seen == [1, 2]\n"
                  "assert h(lambda x: x.append(1)) == [1]"),
    "memoized callback": ("import functools\ndef memo(g): return functools.lru_cache(None)(g)",
                          "def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\nfib = memo(fib)\nassert fib(30) == 832040"),
    "callback that raises": ("def f(g):\n    try: g(0)\n    except ZeroDivisionError as e: return str(e)",
                             "assert f(lambda x: 1 / x) == 'division by zero'"),
    "callback from threads": ("from concurrent.futures import ThreadPoolExecutor\ndef f(g, xs):\n"
                              "    with ThreadPoolExecutor(4) as pool: return list(pool.map(g, xs))",
                              "assert f(lambda v: v + 1, [1, 2, 3, 4]) == [2, 3, 4, 5]"),
    "iterator as argument": ("def f(it, n): return [next(it) for _ in range(n)]",
                             "import itertools\nc = itertools.count()\nassert f(c, 3) == [0, 1, 2] and next(c) == 3\n"
                             "assert f((x for x in 'ab'), 2) == ['a', 'b']"),
    "types": ("def f(xs, t): return [v for v in xs if isinstance(v, t)]\ndef g(x): return type(x)\ndef h(e): raise e('x')",
              "assert f([1, 'a'], int) == [1] and g(1) is int and g(None) is type(None)\n"
              "try:\n    h(ValueError)\n    assert False\nexcept ValueError: pass"),
    "arrays": ("import numpy as np\ndef f(): return np.zeros((2, 3))\ndef g(a): return a + 1\ndef h(): return np.zeros((0, 2))",
               "import numpy as np\nassert f().shape == (2, 3) and f().dtype == float and h().shape == (0, 2)\n"
               "assert np.array_equal(g(np.arange(3)), [1, 2, 3])"),
    "namedtuple": ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)\n"
                   "def g(p): return isinstance(p, P) and p.x",
                   "p = f()\nassert p == (1, 2) and p.x == 1 and isinstance(p, P) and g(p) == 1 and P(3, 4).y == 4"),
    "Counter": ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aab').most_common(1) == [('a', 2)]"),
    "own exceptions": ("class Bad(ValueError): pass\nclass Worse(Bad):\n    def __init__(self, code): self.code = code\n"
                       "    def __str__(self): return f'code {self.code}'\ndef f(x):\n    if x < 0: raise Bad('negative')\n"
                       "    if x > 9: raise Worse(x)\n    return x\nError = KeyError\ndef g(): raise Error('k')",
                       "try:\n    f(-1)\n    assert False\nexcept Bad as e:\n    assert str(e) == 'negative' and type(e) is Bad\n"
                       "try:\n    f(10)\n    assert False\nexcept Bad as e:\n    assert str(e) == 'code 10' and e.code == 10\n"
                       "try:\n    g()\nexcept Error as e: assert e.args == ('k',)\n"
                       "import unittest\nunittest.TestCase().assertRaises(Bad, f, -1)\nassert issubclass(Worse, Bad)"),
    "exceptions of the standard library": (
        "import dataclasses, decimal, json\ndef f(s): return json.loads(s)\ndef g(s): return decimal.Decimal(s)\n"
        "@dataclasses.dataclass(frozen=True)\nclass P:\n    x: int",
        "import dataclasses, decimal, json, unittest\nraises = unittest.TestCase().assertRaises\nraises(decimal.InvalidOperation, g, 'x')\n"
        "raises(dataclasses.FrozenInstanceError, setattr, P(1), 'x', 2)\n"
        "try:\n    f('x')\n    assert False\nexcept json.JSONDecodeError as e: assert e.pos == 0 and 'Expecting value' in str(e)"),
    "own exception with an errno": ("class Bad(OSError): pass\ndef f(): raise Bad(2, 'no')",
                                    "try:\n    f()\n    assert False\nexcept Bad as e: assert e.errno == 2"),
    "only raises": ("class Bad(Exception): pass\ndef f(): raise Bad", "try:\n    f()\nexcept Bad: pass\nelse: assert False"),
    "isinstance of own classes": ("class A: pass\nclass B(A): pass",
                                  "assert isinstance(B(), A) and not isinstance(A(), B) and not isinstance(3, A)\n"
                                  "assert issubclass(B, A) and not issubclass(int, A)"),
    "operators": ("class V:\n    def __init__(s, x): s.x = x\n    def __add__(s, o): return V(s.x + o.x)\n"
                  "    def __mul__(s, o): return s.x * o.x\n    def __neg__(s): return V(-s.x)\n    def __abs__(s): return abs(s.x)\n"
                  "    def __lt__(s, o): return s.x < o.x\n    def __eq__(s, o): return s.x == o.x\n"
                  "    def __getitem__(s, i): return [s.x, s.x + 1, s.x + 2][i]\n    def __setitem__(s, i, v): s.x = v",
                  "assert (V(1) + V(2)).x == 3 and V(1) < V(2) and V(2) > V(1) and V(2) * V(3) == 6 and -V(1) == V(-1)\n"
                  "assert abs(V(-2)) == 2 and sorted([V(2), V(1)])[0] == V(1) and V(1)[1:] == [2, 3]\nv = V(1)\nv[0] = 7\nassert v.x == 7"),
    "aware datetimes": ("from datetime import datetime, timezone, timedelta\n"
                        "def f(): return datetime(2020, 1, 1, 5, tzinfo=timezone(timedelta(hours=5)))",
                        "import datetime as d\nassert f() == d.datetime(2020, 1, 1, tzinfo=d.timezone.utc)"),
    "future import before code": ("from __future__ import annotations; import math\nfrom __future__ import (annotations,\n  division)\n"
                                  "def f(x: Unknown): return math.floor(x)", "assert f(1.5) == 1"),
    "future import behind a preamble": ("import math\n'text'\nfrom __future__ import annotations  # why\ndef f(x: Unknown): return x",
                                        "assert f(1) == 1"),
    "nested 500 deep": ("def f(x): return [x]", "x = []\nfor _ in range(500): x = [x]\nassert f(x) == [x]"),
    "iterators": ("def f(n):\n    for i in range(n): yield i\ndef g(d): return d.keys()\ndef h(x): return map(str, x)",
                  "assert list(f(3)) == [0, 1, 2]\nassert set(g({1: 2})) == {1}\nassert 1 in g({1: 2})\n"
                  "assert sorted(h([2, 1])) == ['1', '2']\nassert sum(f(4)) == 6\nassert next(iter(f(2))) == 0"),
    "classes": ("class Node:\n    def __init__(self, v): self.v, self.left = v, None\n    def __len__(self): return 7\n"
                "    def __eq__(self, o): return self.v == o.v\n    def __str__(self): return f'N{self.v}'\n"
                "    def __getitem__(self, i): return [self.v, i]\ndef depth(n): return 1 + depth(n.left) if n else 0\n"
                "Node.__bool__ = lambda self: True",
                "n = Node(1)\nn.left = Node(2)\nn.left.left = Node(3)\nassert depth(n) == 3\nassert n.left.v == 2\n"
                "assert Node(4) == Node(4)\nassert Node(4) != Node(5)\nassert str(n) == 'N1'\nassert len(n) == 7\n"
                "assert n[3] == [1, 3]"),
    "hash": ("class V:\n    def __init__(s, x): s.x = x\n    def __eq__(s, o): return s.x == o.x\n    def __hash__(s): return hash(s.x)",
             "assert len({V(1), V(1), V(2)}) == 2 and {V(1): 5}[V(1)] == 5"),
    "a built-in class": ("to_int = int", "assert to_int('3') == 3"),
    "stateful class": ("class Stack:\n    def __init__(self): self.x = []\n    def push(self, v): self.x.append(v)\n"
                       "    def pop(self): return self.x.pop()", "s = Stack()\ns.push(1)\ns.push(2)\nassert s.pop() == 2\ndel s.x\nassert not hasattr(s, 'x')"),
    "constants": ("LIMIT = 7\ndef f(): return LIMIT", "assert LIMIT == 7 and f() == LIMIT"),
    "redefined builtin": ("def sum(a, b): return a + b", "assert sum(10, 15) == 25\nassert sum(1, 2) == 3"),
    "named like a module": ("def copy(a): return a", "assert copy(3) == 3"),
    "module of the test, named like one": ("def trace(m): return m[0][0]", "assert math.isclose(trace([[1.0]]), 1)"),
    "prompt as setup": ("def helper(x): return 0\ndef f(x): return 2 * x", "assert helper(f(2)) == 5",
                        "def helper(x): return x + 1\ndef f(x): pass", "f"),
    "slow but within limits": ("import time\ndef f():\n    time.sleep(0.5)\n    return 1", "assert f() == 1"),
    "keyword arguments": ("def f(*, a=1, **k): return a, k", "assert f(a=2, b=3) == (2, {'b': 3})"),
    "dataclass": ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 1\ndef f(p): return p.x",
                  "assert f(P(5)) == 5 and P() == P(1)"),
    "random": ("import random\ndef f(): return [random.random() for _ in range(3)]", "assert len(set(f())) == 3"),
    "environment": ("import os\ndef f():\n    os.environ['A'] = 'b'; return os.environ['A']", "assert f() == 'b'"),
    "raise its stack limit": ("import resource, sys\nresource.setrlimit(resource.RLIMIT_STACK, "
                              "(1 << 28, resource.getrlimit(resource.RLIMIT_STACK)[1]))\n" + ADD, ASSERTS),
}
HONEST_CALLS = {  # name: (code, fn_name, [(input, output)])
    "json lines": (ADD, "add", [("1\n2", "3"), ('"a"\n"b"\n', '"ab"'), ("[1]\n[2]", "[1, 2]")]),
    "values": (ADD, "add", [([1, 2], 3), (["a", "b"], "ab"), (["1", "2"], "12"), ([[1], [2]], [1, 2])]),
    "Solution": ("class Solution:\n    def add(self, a, b): return a + b", "add", [("1\n2", "3")]),
    "tuples are lists": ("def f(x): return tuple(x), [(1, 2)]", "f", [("[1, 2]", "[[1, 2], [[1, 2]]]")]),
    "rounding": ("def f(): return [0.1 + 0.2]", "f", [("", "[0.3]")]),
    "null, true, text": ("def f(x): return x", "f", [("null", "null"), ("true", "true"), ('"é\\n"', '"é\\n"'), (["x"], "x")]),
    "objects": ("def f(d): return {k: v + 1 for k, v in d.items()}", "f", [('{"a": 1}', '{"a": 2}')]),
    "keys that are numbers": ("def f(x): return {x: 1, 2: 2}", "f", [("1", '{"1": 1, "2": 2}'), ([1], {"1": 1, "2": 2})]),
    "line separator in a text": ("def f(a, b): return a + b", "f", [('"a\u2028"\n"b"', '"a\u2028b"')]),
    "large integer": ("def f(n): return 10 ** n", "f", [("5000", "1" + "0" * 5000), ([5000], 10 ** 5000)]),
    "deep": ("def f(x): return x", "f", [("[" * 500 + "]" * 500, "[" * 500 + "]" * 500)]),
    "all arguments as one list": ("def f(a, b): return a + b\n", "f", [("[1, 2]", "3")]),
    "a list in a list": ("def f(xs): return [x for x in xs if x % 2 == 0]", "f", [("[[1, 2]]", "[2]")]),
    "Solution before an import": ("from heapq import *\nclass Solution:\n    def merge(self, xs): return sorted(xs)",
                                  "merge", [("[2, 1]", "[1, 2]")]),
    "array": ("import numpy as np\ndef f(x): return np.array(x)", "f", [("[1, 2]", "[1, 2]")]),
    "arguments in place": ("def f(x):\n    x.append(1)\n    return x", "f", [("[0]", "[0, 1]"), ([[]], [1])]),
}
HONEST_STDIN = {
    "input": "a, b = map(int, input().split())\nprint(a + b)",
    "sys.stdin": "import sys\nfor line in sys.stdin: print(sum(map(int, line.split())))",
    "open(0)": "print(sum(map(int, open(0).read().split())))",
    "os.read": "import os\nprint(sum(map(int, os.read(0, 1 << 20).split())))",
    "dev stdin": "print(sum(map(int, open('/dev/stdin').read().split())))",
    "BytesIO": "import io, os\ninput = io.BytesIO(os.read(0, os.fstat(0).st_size)).readline\n"
               "print(sum(map(int, input().split())))",
    "os.write": "import os\nos.write(1, str(sum(map(int, input().split()))).encode())",
    "stdout replaced": "import io, os, sys\nout = io.StringIO(); real = sys.stdout; sys.stdout = out\n"
                       "print(sum(map(int, input().split())))\nos.write(1, out.getvalue().encode())",
    "an object of its own": "import os\no = os.fdopen(1, 'w')\no.write(str(sum(map(int, input().split()))))",
    "an object in a cycle": "import os\nclass A: pass\na = A(); a.a = a; a.o = open(1, 'wb', closefd=False)\n"
                            "a.o.write(str(sum(map(int, input().split()))).encode()); del a",
    "stdout replaced after printing": "import io, sys\nprint(sum(map(int, input().split())))\nsys.stdout = io.StringIO()",
    "decimals": "print(float(sum(map(int, input().split()))))",
    "future import": "import sys\nfrom __future__ import annotations\nprint(sum(map(int, input().split())))",
    "atexit": "import atexit\na, b = map(int, input().split())\natexit.register(lambda: print(a + b))",
    "thread not joined": "import threading, time\ndef f():\n    time.sleep(0.1); print(sum(map(int, input().split())))\n"
                         "threading.Thread(target=f).start()",
    "thread with a large stack": "import sys, threading\nsys.setrecursionlimit(10**6); threading.stack_size(1 << 28)\n"
                                 "def g(n): return 0 if n == 0 else 1 + g(n - 1)\n"
                                 "def f():\n    a, b = map(int, input().split()); print(g(10000) - 10000 + a + b)\n"
                                 "t = threading.Thread(target=f); t.start(); t.join()",
    "sys.exit()": "import sys\nprint(sum(map(int, input().split())))\nsys.exit()",
    "os._exit": "import os\nprint(sum(map(int, input().split())), flush=True)\nos._exit(0)",
    "noise on stderr": "import sys\nprint('x' * 100000, file=sys.stderr)\nprint(sum(map(int, input().split())))",
    "white space": "print('\\n  ', sum(map(int, input().split())), '  \\n\\n')",
    "numpy": "import numpy as np\nprint(np.array(input().split(), int).sum())",
}


@pytest.fixture(scope="module", autouse=True)
def closed_workers():
    yield
    sandbox.close_workers()


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    (folder / "precious").write_text("precious")
    (folder / "precious").chmod(0o600)
    os.environ["SANDBOX_TEST_SECRET"] = "secret"
    yield folder / "precious"
    del os.environ["SANDBOX_TEST_SECRET"]


def unharmed(path):
    state = path.stat()
    return (path.read_text() == "precious" and stat.S_IMODE(state.st_mode) == 0o600 and state.st_mtime > 1e9
            and os.listdir(path.parent) == [path.name])


def attack(body, path):
    body = body.replace("@PID@", str(os.getpid())).replace("@FILE@", str(path)).replace("@DIR@", str(path.parent))
    return ATTACK.format(body=textwrap.indent(textwrap.dedent(body), "    "))


def dedent(code):
    return textwrap.dedent(code).strip() + "\n"


def passed(results):
    return [result["passed"] for result in results]


def judged(row):
    return dict(zip(("code", "tests", "setup", "entry_point"), row))


def cheats():
    for name, code in (CHEATS | SELF_KILL).items():
        yield from ((name, program) for program in styles(dedent(code)))
    yield from ((name, judged(row)) for name, row in CHEATS_OF_TESTS.items())
    yield from ((name, {"code": dedent(code), "cases": STDIN}) for name, code in (CHEATS_STDIN | SELF_KILL).items())


def honest():
    yield from ((name, judged(row)) for name, row in HONEST.items())
    for name, (code, function, cases) in HONEST_CALLS.items():
        yield name, {"code": code, "fn_name": function, "cases": [{"input": i, "output": o} for i, o in cases]}
    yield from ((name, {"code": code, "cases": STDIN}) for name, code in HONEST_STDIN.items())


@pytest.mark.parametrize(("table", "passes", "timeout_s"), [(cheats, False, 1), (honest, True, 20)])
def test_honest_programs_pass_and_cheats_fail(table, passes, timeout_s):
    names, programs = zip(*table())
    results = run_tests(programs, timeout_s=timeout_s)
    assert [(name, result) for name, result in zip(names, results) if result["passed"] is not passes] == []


@pytest.mark.skipif(not LANDLOCK, reason="this kernel has no Landlock")
def test_attacks_get_nowhere(outside):
    programs, names = [], []
    for name, body in ATTACKS.items():
        code = attack(body, outside)
        programs += [{"code": code, "tests": "marker_1538 = 0\n" + ASSERTS}, {"code": code, "cases": STDIN}]
        names += [f"{name} (assert)", f"{name} (stdin)"]
    results = run_tests(programs, timeout_s=4)
    assert [(name, result) for name, result in zip(names, results) if result["passed"]] == []
    # it was the answer that was wrong: nothing crashed before the attack was tried
    odd = [(name, result["reason"]) for name, result in zip(names, results) if result["reason"] != "wrong answer"]
    assert odd == []
    assert unharmed(outside)
    assert not os.path.exists("/dev/shm/sandbox_test_new") and not os.path.exists("/tmp/sandbox_test_new")


@pytest.mark.skipif(not sandbox.HAS_FILTER, reason="no list of system calls for this machine")
def test_no_system_call_but_those_listed():
    """Each other number gives EPERM or, if it is new, ENOSYS: no fork, mount, socket, chmod, ptrace, memfd, bpf ..."""
    code = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def others():
    numbers = sorted(set(range(600)) - {set(sandbox.NUMBER.values())} - {{335, 336}})  # probes: Linux filters them itself
    return [n for n in numbers if libc.syscall(n, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() not in (1, 38)]"""
    (result,) = run_tests([{"code": code, "tests": "assert others() == []"}])
    assert result["passed"], result


def test_bombs_are_contained_and_named(outside):
    wanted = {**BOMBS, **BOMBS_STDIN}
    programs = [{"code": dedent(code) + "\n" + ADD, "tests": ASSERTS} for _, code in BOMBS.values()]
    programs += [{"code": dedent(code), "cases": STDIN} for _, code in BOMBS_STDIN.values()]
    for program, (reason, _) in zip(programs, wanted.values()):
        program["timeout_s"] = 0.7 if reason == "timeout" else 20
    results = run_tests(programs, memory_mb=256)
    odd = [(name, result["reason"]) for (name, (reason, _)), result in zip(wanted.items(), results)
           if result["passed"] or not result["reason"].startswith(reason)]
    assert odd == []


def test_large_stdin_and_stdout():
    lines = [str(number) for number in range(200_000)]
    echo = "import sys\nprint('\\n'.join(sys.stdin.read().split()))"
    cases = [{"input": "\n".join(lines), "output": "\n".join(lines) + "\n"}]
    short = echo.replace("split()", "split()[:-1]")
    good, bad = run_tests([{"code": echo, "cases": cases}, {"code": short, "cases": cases}], timeout_s=20)
    assert good["passed"] and bad["reason"] == "wrong answer"


def test_unicode_at_stdin_and_stdout():
    cases = [{"input": "größe \U0001f600\u0000\n", "output": "\U0001f600\u0000 größe\n"}]
    wrong = [{"input": cases[0]["input"], "output": "\U0001f600\u0000 grosse\n"}]
    code = "print(*reversed(input().split()))"
    good, bad = run_tests([{"code": code, "cases": cases}, {"code": code, "cases": wrong}], timeout_s=20)
    assert good["passed"] and bad["reason"] == "wrong answer"


@pytest.mark.parametrize(("output", "expected", "same"), [
    ("3", "3\n", True), ("  3 \n\n", "3", True), ("1 2\n3", "1\n2 3\n", False), ("", "", True), ("\n", "", True),
    ("3 4", "3", False), ("3", "3 4", False), ("", "3", False), ("3", "", False), ("33", "3 3", False),
    ("1\n2", "1 2", False), ("1 2", "1\n2", False), ("1\n\n2", "1\n2", False), ("1  2 \n 3", "1 2\n3", True),
    ("3.0", "3.0", True), ("3.00", "3.0", True), ("3.0000001", "3.0", True), ("3.00001", "3.0", False),
    ("3", "3.0", True), ("3.0", "3", True), ("3.0000001", "3", False), ("3.", "3.0", True), (".5", "0.5", True),
    ("1e3", "1000.0", True), ("1E+3", "1e3", True), ("1e", "1.0", False), ("-0.0", "0.0", True), ("-.5", "-0.5", True),
    ("100000000000000001", "100000000000000000", False), ("100000000000000001.0", "100000000000000000.0", True),
    ("007", "7", True), ("+3", "3", True), ("YES", "yes", False), ("nan", "nan", True), ("nan", "1.0", False),
    ("inf", "1e999", False), ("0x10", "16", False), ("é", "é", True),
    ("1,2", "1, 2", False), ("1.0 2.0", "1.0 2.1", False), ("1" * 5000, "1" * 5000 + ".0", True),
    ("0.3333333", "0.33333333333", True), ("0.333", "0.33333333333", False), ("1e999999999", "1", False),
])
def test_output_is_compared_by_livecodebenchs_rule(output, expected, same):
    assert same_output(output, expected) is same


@pytest.mark.parametrize(("got", "want", "same"), [
    (3, 3, True), (3, "3", False), ("3", 3, False), ((1, (2,)), [1, [2]], True), ([1], [1, 2], False), ([], {}, False),
    (0.1 + 0.2, 0.3, True), (0.30001, 0.3, False), ([1.0], [1.0 + 1e-9], True), (10**17 + 1, 10**17, False),
    ({"a": (1,)}, {"a": [1]}, True), ({"a": 1}, {"a": 2}, False), ({"a": 1}, {"b": 1}, False), (None, 0, False),
    (float("nan"), 1.0, False), ({1}, [1], False), ("ab", ["a", "b"], False), (True, False, False),
])
def test_values_are_compared_as_json(got, want, same):
    assert sandbox.same_value(got, want) is same


def test_reasons():
    def result(**program):
        return run_tests([program], timeout_s=2)[0]["reason"]

    assert result(code=ADD, tests=ASSERTS) == "passed"
    assert result(code="def add(a, b): return 3 if a == 1 else 0", tests=ASSERTS) == "wrong answer"
    assert result(code=ADD, tests=CHECK) == "passed"
    for nothing in ({"tests": ""}, {"cases": []}, {"tests": "def test(): assert add(1, 2) == 3"}, {"tests": "x = add"}):
        assert result(code=ADD, **nothing) == "no tests"
    assert result(code="", tests=ASSERTS) == "exception: NameError: name 'add' is not defined"
    assert result(code=ADD, tests="assert add(1) == 1").startswith("exception: TypeError: add() missing 1 required")
    assert result(code="def add(a, b): return None", tests="assert add(1, 2) > 1").startswith("exception: TypeError")
    assert result(code=ADD, tests="assert add(").startswith("exception: SyntaxError")
    assert result(code="import os\ndef add(a, b): os._exit(3)", tests=ASSERTS) == "exited with status 3"
    assert result(code="def add(a, b): raise ValueError('a\x1b[31mb')", tests=ASSERTS) == "exception: ValueError: a [31mb"
    assert result(code=ADD, tests="class A: pass\nadd(A(), 1)").endswith("a test cannot pass a A to the program")
    assert result(code="def f(): return '\\\\' * 5 * 10**6", tests="{}[f()]").startswith("exception: KeyError: ")  # 20 MB
    assert result(code="print(3)", cases=STDIN) == "wrong answer"
    assert result(code="print(4)", cases=[{"input": "", "output": 4}, {"input": 1, "output": ["4", ""]}]) == "passed"


def test_all_cases():
    """Partial credit: how many cases pass. A timeout ends it, or a loop would cost the limit for each case."""
    def counts(all_cases=True, **program):
        (found,) = run_tests([program], timeout_s=1, all_cases=all_cases)
        return found["passed_cases"], found["total_cases"], found["reason"]

    assert counts(code="print(3)", cases=STDIN[::-1]) == (1, 2, "wrong answer")
    assert counts(code="print(3)", cases=STDIN[::-1], all_cases=True) == (1, 2, "wrong answer")
    assert counts(code=ADD, tests=ASSERTS) == (1, 1, "passed")
    calls = [{"input": [0], "output": 1}, {"input": [1], "output": 1}, {"input": [2], "output": 0.5}]
    code = "def f(x): return 1 / x"
    assert counts(code=code, fn_name="f", cases=calls) == (2, 3, "exception: ZeroDivisionError: division by zero")
    assert "passed_cases" not in run_tests([{"code": code, "fn_name": "f", "cases": calls}])[0]
    assert counts(code="", fn_name="f", cases=calls)[2].startswith("exception: NameError")
    begun = time.monotonic()
    loop = "def f(x):\n    while x == 1: pass\n    return x"
    calls = [{"input": [x], "output": x} for x in (0, *[1] * 20)]
    assert counts(code=loop, fn_name="f", cases=calls) == (1, 21, "timeout")
    script = "x = int(input())\nwhile x == 1: pass\nprint(x)"
    cases = [{"input": f"{x}", "output": x} for x in (0, *[1] * 20)]
    assert counts(code=script, cases=cases) == (1, 21, "timeout")
    assert time.monotonic() - begun < 15


def test_an_input_that_is_the_expected_list_too():
    """A case's arguments can be changed by the program, the expected value of this case or of another cannot."""
    want = [1]
    cases = [{"input": [want], "output": want}, {"input": [[5]], "output": want}]
    code = "def f(x):\n    if x == [5]: return [9]\n    x[:] = [9]"
    (result,) = run_tests([{"code": code, "fn_name": "f", "cases": cases}], all_cases=True)
    assert result["passed_cases"] == 0 and want == [1]


def test_the_time_limit_is_per_case():
    code = "import time\ndef f(x):\n    time.sleep(0.4)\n    return x"
    calls = [{"input": [x], "output": x} for x in range(5)]
    assert run_tests([{"code": code, "fn_name": "f", "cases": calls}], timeout_s=1)[0]["passed"]


def test_limits_are_options():
    def reason(code, **options):
        return run_tests([{"code": code, "tests": "f()"}], **options)[0]["reason"]

    sleep = "import time\ndef f(): time.sleep(0.7)"
    assert reason(sleep, timeout_s=0.3) == "timeout"
    assert reason(sleep, timeout_s=6) == "passed"
    assert run_tests([{"code": sleep, "tests": "f()", "timeout_s": 0.3}], timeout_s=6)[0]["reason"] == "timeout"
    assert reason("def f(): bytearray(300 << 20)", memory_mb=200) == "memory"
    assert reason("def f(): bytearray(300 << 20)", memory_mb=600) == "passed"


def test_nothing_reaches_the_next_test():
    """Neither from a test nor from a program, on the same worker; and the seed of `hash` is fixed."""
    spoil = "import math, decimal, random\nmath.pi = 3\ndecimal.getcontext().prec = 2\nimport builtins\nbuiltins.abs = None\n"
    look = "import math, decimal\nassert math.pi > 3.1 and abs(f()) == 1 and decimal.getcontext().prec == 28"
    programs = [{"code": spoil + "def f(): return 1", "tests": spoil + "f()"}, {"code": "def f(): return -1", "tests": look}]
    assert passed(run_tests(programs * 2, workers=1)) == [True] * 4
    ways = ("import math\nmath.pi = 3", "import math\ndel math.pi", "exec('import math; math.pi = 3')", "setattr(math, 'pi', 3)",
            "(x for x in []).gi_frame.f_builtins['abs'] = None", "__builtins__.abs = None", "vars(math)['pi'] = 3", "import json.encoder as e\ne.float.x = 1",
            "from decimal import *\nsetcontext(Context(prec=2))", "f().pi = 3", "def g():\n    import math\n    math.pi = 3\ng()",
            "from typing import *\nmath.pi = 3", "import decimal\ndecimal.getcontext().prec = 2", "import typing\ntyping.sys.modules['math'] = None")
    programs = [{"code": "import math\ndef f(): return math", "tests": f"f()\ntry:\n{textwrap.indent(way, '    ')}\nexcept AttributeError: pass"}
                for way in ways]
    look = {"code": "def f(): return -1", "tests": look}
    found = run_tests([program for i, spoil in enumerate(programs) for program in (spoil, look | {"code": f"{look['code']}#{i}"})], workers=1)
    assert passed(found[1::2]) == [True] * len(ways), list(zip(ways, found[1::2]))
    late = "def g():\n    try: yield f()\n    finally: f()\nx = g()\nnext(x)"  # its end is when T collects garbage
    look = "x = [[f()] for i in range(3000)]\nassert x[-1] == [3000]"
    counter = "n = 0\ndef f():\n    global n; n += 1; return n"
    assert all(passed(run_tests([{"code": counter + f"#{i}", "tests": tests} for i in range(3) for tests in (late, look)], workers=1)))
    hashes = {"code": "def f(): return hash('text')", "tests": "assert f() == hash('text')"}
    assert run_tests([hashes])[0]["passed"]


@pytest.mark.parametrize(("tests", "stays"), [
    (ASSERTS, True), (CHECK, True), ("import math\nassert math.isclose(add(1, 2), 3)", True),
    ("from typing import List\ndef g(x: List[int]) -> int: return x\nassert add(1, 2) == g(3)", True),
    ("x = [add(1, 2)]\nx.append(3)\nx[0] += 1\nassert sorted(x) == [3, 4]", True),
    ("assert add(1, 2) == math.floor(3.5)", True), ("math.pi = 3\nadd(1, 2)", False), ("def g():\n    math.pi = 3\nadd(1, 2)", False),
    ("import random\nadd(1, 2)", False), ("import numpy\nadd(1, 2)", False), ("import wave\nadd(1, 2)", False), ("eval('add(1, 2)')", False),
    ("add(1, 2)\nx = add.__name__", False), ("x = [0] * 2 * 10**7\nadd(1, 2)", False)])
def test_the_tester_stays_for_the_next_program_if_the_test_is_harmless(tests, stays):
    sandbox.close_workers()
    run_tests([{"code": ADD, "tests": ASSERTS}], workers=1)
    (worker,) = sandbox.Worker.live
    before = descendants(worker.process.pid)
    assert len(before) == 1 and run_tests([{"code": ADD + "#", "tests": tests}], workers=1)[0]["passed"]
    assert descendants(worker.process.pid) == (before if stays else [])


@pytest.mark.parametrize("code", [
    "import os\ndef add(a, b): os._exit(0)", "def add(a, b):\n    while True: pass", "def add(a, b): raise ValueError",
    "import collections\ndef add(a, b): return collections.namedtuple('P', 'x')(1)", "def add(a, b): return [0] * 10**7",
    "class Bad(Exception): pass\ndef add(a, b): raise Bad", "import numpy\ndef add(a, b): return numpy.zeros(3)",
    forged('["value", 3, []]\\n["value", 3, []]\\n["value", 3, []]').replace("def f", "def add"), "import os\nos.close(3)"])
def test_no_program_changes_the_verdict_of_the_next(code):
    """The tester that judges both is the same process, unless the first one ends it."""
    programs = [{"code": code, "tests": ASSERTS}, {"code": ADD, "tests": ASSERTS}, {"code": "def add(a, b): return 3", "tests": ASSERTS}]
    assert [result["reason"] for result in run_tests(programs, timeout_s=2, workers=1)][1:] == ["passed", "wrong answer"]


def test_zygote_shows_nothing_of_itself():
    """Not the folder that it was imported from, nor the program that it warms up with."""
    code = f"import sys\nprint({str(ROOT)!r} in sys.path, 'solution' in sys.modules, vars().get('config'))"
    assert run_tests([{"code": code, "cases": [{"input": "", "output": "False False None"}]}])[0]["passed"]
    result = run_tests([{"code": "def f(*args, **named): return 1", "tests": "import solution"}])[0]
    assert "No module named 'solution'" in result["reason"]


def test_numpy_is_imported_once_per_worker_if_the_tests_use_it():
    """Not in each tester, which would take 60 ms a program; and only then, as it makes each fork dearer."""
    sandbox.close_workers()
    plain, tests = {"code": "import sys\ndef f(): return 'numpy' in sys.modules"}, ("assert not f()", "import numpy\nassert f()")
    assert passed(run_tests([plain | {"tests": text} for text in tests], workers=1)) == [True, True]


def test_results_come_in_order_and_equal_programs_run_once():
    code = "import time; time.sleep(0.4)\n" + ADD
    programs = [{"code": code, "tests": ASSERTS, "task_id": i} for i in range(8)] + [{"code": "", "tests": ASSERTS}]
    start = time.monotonic()
    results = run_tests(programs, workers=1)
    assert time.monotonic() - start < 8 * 0.4
    assert passed(results) == [True] * 8 + [False]
    assert run_tests([]) == []


@pytest.mark.parametrize("program", [{"code": ADD}, {"tests": ASSERTS}, {"code": None, "tests": ""}])
def test_what_is_no_program_is_refused(program):
    with pytest.raises(ValueError, match="program 0 needs"):
        run_tests([program])


def test_called_from_threads_at_once():
    results = {}

    def call(place):
        results[place] = run_tests([{"code": ADD + f"# {place} {i}", "tests": ASSERTS} for i in range(10)], workers=2)

    threads = [threading.Thread(target=call, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [passed(results[place]) for place in range(3)] == [[True] * 10] * 3


def test_workers_stay_and_a_dead_one_is_replaced():
    sandbox.close_workers()
    run_tests([{"code": ADD, "tests": ASSERTS}], workers=1)
    (worker,) = sandbox.Worker.live
    process = worker.process
    run_tests([{"code": ADD + "#", "tests": ASSERTS}], workers=1)
    assert [worker] == sandbox.Worker.live and worker.process is process
    worker.process.kill()
    worker.process.wait()
    assert passed(run_tests([{"code": ADD, "tests": ASSERTS}], workers=1)) == [True]


def test_a_worker_that_was_in_use_when_all_were_closed_is_closed_the_next_time():
    sandbox.close_workers()
    run_tests([{"code": ADD, "tests": ASSERTS}], workers=1)
    worker = sandbox.Worker.idle.pop()
    sandbox.close_workers()
    sandbox.Worker.idle.append(worker)
    assert passed(run_tests([{"code": ADD, "tests": ASSERTS}], workers=1)) == [True]
    assert sandbox.Worker.live == [worker]
    sandbox.close_workers()
    assert worker.process.poll() is not None


def test_a_program_does_not_get_the_socket_of_a_caller_with_many_files():
    """With it, it could answer for the programs that come after it."""
    code = "import os, stat\ndef sockets():\n    found = []\n    for fd in range(3, 2000):\n" \
           "        try: found += [fd] * stat.S_ISSOCK(os.fstat(fd).st_mode)\n        except OSError: pass\n    return found"
    sandbox.close_workers()
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(300)]
    try:
        assert run_tests([{"code": code, "tests": "assert sockets() == [3]"}], workers=1)[0]["passed"]
    finally:
        for fd in files:
            os.close(fd)


def test_files_on_their_way_to_other_workers_count_for_none():
    """The kernel limits them per user; with 64 workers there are hundreds."""
    sandbox.close_workers()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"1"], [0] * 250)
        assert passed(run_tests([{"code": ADD, "tests": ASSERTS}])) == [True]


def test_signals_that_the_caller_blocks_reach_a_program():
    code = "import signal, time\nsignal.signal(signal.SIGALRM, lambda *_: print(3))\n" \
           "signal.setitimer(signal.ITIMER_REAL, 0.01)\ntime.sleep(0.1)"
    sandbox.close_workers()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        assert run_tests([{"code": code, "cases": [{"input": "", "output": "3"}]}])[0]["passed"]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_when(condition, times):
    """Kills, so often, what `condition` finds: from outside, as a machine without memory would."""
    def run():
        for _ in range(times):
            wait_for(lambda: (found := condition()) and not os.kill(found[0], signal.SIGKILL))
            time.sleep(0.3)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


SLEEP = [{"code": "import time; time.sleep(1.5)\n" + ADD, "tests": ASSERTS}, {"code": ADD, "tests": ASSERTS}]


def busy_workers():
    processes = [worker.process for worker in list(sandbox.Worker.live) if worker.process]  # None: it starts
    return [process.pid for process in processes if len(descendants(process.pid)) == 2]


def busy_candidates():
    return [max(descendants(pid)) for pid in busy_workers()]


@pytest.mark.parametrize("victims", [busy_workers, busy_candidates])
def test_what_the_machine_kills_runs_again_and_is_then_an_error(victims):
    sandbox.close_workers()
    run_tests(SLEEP[1:], workers=1)
    killer = kill_when(victims, 1)
    assert passed(run_tests(SLEEP, timeout_s=60, workers=1)) == [True, True]
    killer.join()
    killer = kill_when(victims, 2)
    with pytest.raises(sandbox.SandboxError, match="limits of this machine"):
        run_tests(SLEEP, timeout_s=60, workers=1)
    killer.join()
    assert passed(run_tests(SLEEP[1:], workers=1)) == [True]


@pytest.mark.parametrize(("limit", "fails"), [
    ("ulimit -v 600000", ""), ("ulimit -f 20000", ""), ("ulimit -n 40", ""), ("ulimit -t 300", ""),
    ("ulimit -v 20000", "ulimit -v"), ("ulimit -f 0", "ulimit -f")])
def test_inherited_limits(limit, fails):
    """The smaller limit holds; where nothing runs under it, an error names it."""
    code = SCRIPT.format(root=str(ROOT), setup="", programs=[{"code": ADD, "tests": ASSERTS}, {"code": ADD + "print(3)", "cases": [
        {"input": "", "output": "3"}]}])
    # only the sandbox's processes: the caller would need more than some of these allow
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sandbox; sandbox.SHELL = {limit!r} + '; ' + sandbox.SHELL\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if fails:
        assert "SandboxError" in done.stderr and "True" not in done.stdout and "False" not in done.stdout
    else:
        assert eval(done.stdout.partition("\n")[2]) == [(True, "passed")] * 2, done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_limit_on_processes_is_an_error():
    setup = "import os, resource\nos.setgroups([]); os.setgid(54321); os.setuid(54321)\n" \
            "resource.setrlimit(resource.RLIMIT_NPROC, (4, 4))"
    script = start_script([{"code": ADD, "tests": ASSERTS}], setup)
    out, err = script.communicate(timeout=120)
    assert "SandboxError" in err and "ulimit -u: 4" in err and "alse" not in out, (out, err)


def test_many_workers_on_one_core():
    honest = "def f(n):\n    return sum(i * i for i in range(n))"
    programs = [{"code": f"{honest}#{i}", "tests": "assert f(500000) > 0"} for i in range(24)]
    cores = os.sched_getaffinity(0)
    sandbox.close_workers()
    os.sched_setaffinity(0, {min(cores)})
    try:
        results = run_tests(programs, timeout_s=1, workers=12)
    finally:
        os.sched_setaffinity(0, cores)
        sandbox.close_workers()
    assert all(passed(results)), results


def test_workers_are_the_cores_that_may_be_used(monkeypatch):
    values = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(sandbox, "cgroup_values", lambda name: iter(values.get(name, [])))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert sandbox.usable_cores() == 16
    values["cpu.max"] = [["max", "100000"], ["350000", "100000"]]
    assert sandbox.usable_cores() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert sandbox.usable_cores() == 1
    values.clear()
    values |= {"cpu.cfs_quota_us": [["-1"], ["600000"]], "cpu.cfs_period_us": [["100000"], ["100000"]]}
    assert sandbox.usable_cores() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert sandbox.usable_cores() == 1


def test_each_worker_stays_on_a_core_of_its_own(monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    code = "import os\ndef cores(): return os.sched_getaffinity(0)"

    def cores_of(workers):
        sandbox.close_workers()
        programs = [{"code": f"{code}#{i}", "tests": "assert len(cores()) == 1"} for i in range(4 * workers)]
        results = run_tests(programs, workers=workers)
        assert all(passed(results))
        return sorted(worker.core for worker in sandbox.Worker.live)

    found = cores_of(len(cores))
    assert len(set(found)) == len(found) and (len(found) > 1 or len(cores) == 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cores_of(1) == [cores[len(cores) // 2]]


def test_nothing_is_left():
    sandbox.close_workers()
    run_tests([{"code": f"import time\n{ADD}#{i}", "tests": ASSERTS} for i in range(20)], workers=2)
    pids = [pid for worker in sandbox.Worker.live for pid in (worker.process.pid, *descendants(worker.process.pid))]
    assert len(pids) == 4  # two zygotes, and a tester of each
    sandbox.close_workers()
    assert wait_for(lambda: not any(map(alive, pids)))


SCRIPT = """
import sys; sys.path.insert(0, {root!r})
from sandbox import run_tests
import sandbox
{setup}
programs = {programs!r}
print("ready", flush=True)
print([(r["passed"], r["reason"]) for r in run_tests(programs, timeout_s=60, workers=2)])
"""


def start_script(programs, setup="", **options):
    code = SCRIPT.format(root=str(ROOT), setup=setup, programs=programs)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, **options)


def wait_for(condition, seconds=60):
    """-> whether it came true in time"""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


FORK = "run_tests([{'code': '', 'tests': 'True'}, {'code': '', 'tests': '1'}], workers=2)\n" \
       "import os, time\nif not os.fork(): time.sleep(60); os._exit(0)"


@pytest.mark.parametrize(("number", "setup"), [
    (signal.SIGINT, ""), (signal.SIGTERM, ""), (signal.SIGKILL, ""),
    (signal.SIGKILL, FORK)])  # a fork of the caller lives on, and holds the sockets to the workers
def test_interrupted_in_the_middle(number, setup, tmp_path):
    busy = [{"code": f"while True: {i}", "tests": ASSERTS} for i in range(4)]
    script = start_script(busy, setup, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert script.stdout.readline() == "ready\n"

    def busy_in_all_workers():  # the same 2 x (Z, T, C) for a second: the checks of a new worker are over sooner
        before = descendants(script.pid)
        time.sleep(1)
        return len(before) == 6 + bool(setup) and descendants(script.pid) == before

    assert wait_for(busy_in_all_workers)
    children = [int(child) for child in Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()]
    pids = [pid for pid in descendants(script.pid) if not (setup and pid in children and not descendants(pid))]
    assert len(pids) == 6 and os.listdir(tmp_path) == []
    script.send_signal(number)
    script.wait(30)
    try:
        assert wait_for(lambda: not any(map(alive, pids))) and os.listdir(tmp_path) == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)  # the fork
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in script.stderr.read()


PROBES = {  # name: (code, tests, passes without Landlock)
    "honest": (ADD, ASSERTS, True),
    "cheat": ("class E:\n    def __eq__(self, o): return True\ndef add(a, b): return E()", ASSERTS, False),
    "early exit": ("import os; os._exit(0)", ASSERTS, False),
    "fork": (ATTACK.format(body="    os.fork(); hit = True"), ASSERTS, False),
    "kill": (ATTACK.format(body="    os.kill(os.getppid(), 0); hit = True"), ASSERTS, False),
    "socket": (ATTACK.format(body="    import socket; socket.socket(); hit = True"), ASSERTS, False),
    "write": (ATTACK.format(body="    open('/tmp/sandbox_test_new', 'w'); hit = True"), ASSERTS, False),
    "delete": (ATTACK.format(body="    os.remove('/tmp/sandbox_test_new'); hit = True"), ASSERTS, False),
    "zygote's and tester's memory": (ATTACK.format(body="""
    for pid in filter(str.isdigit, os.listdir('/proc')):
        parent = open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1]
        if str(os.getppid()) in (pid, parent) and int(pid) != os.getpid():
            try: hit = bool(open(f'/proc/{pid}/mem', 'rb'))
            except OSError: pass"""), ASSERTS, False),
    "environment": (ATTACK.format(body="    hit = len(os.environ) > 9"), ASSERTS, False),
    "numpy": ("import numpy\n" + ADD, ASSERTS, True),
}


NEEDS_SECCOMP = {"fork", "kill", "socket", "write", "delete", "zygote's and tester's memory", "environment"}


def run_probes(setup="", programs=PROBES, **options):
    """-> (the probes' verdicts, what was said on stderr)"""
    script = start_script([{"code": code, "tests": tests} for code, tests, _ in programs.values()], setup, **options)
    out, err = script.communicate(timeout=120)
    assert script.returncode == 0, err
    return {name: row for name, row in zip(programs, eval(out.partition("\n")[2]))}, err


@pytest.mark.parametrize(("without", "lost"), [((), ()), (("Landlock",), ()), (("Landlock", "seccomp"), NEEDS_SECCOMP)])
def test_verdicts_hold_without_a_protection(without, lost):
    """What is missing is said, and only that."""
    if not without and not (LANDLOCK and sandbox.HAS_FILTER):
        pytest.skip("a protection is missing here")
    probes = {name: row for name, row in PROBES.items() if name not in lost}
    results, said = run_probes(f"sandbox.WITHOUT += {list(without)}", probes)
    assert {name: row[0] for name, row in results.items()} == {name: row[2] for name, row in probes.items()}, results
    assert said.count("\n") == bool(without) and " and no ".join(without) in said


@pytest.mark.parametrize(("setup", "lacks"), [
    ("sandbox.sys.platform = 'darwin'", "programs run on Linux only"),
    ("sandbox.SHELL = 'ulimit -v 9000; ' + sandbox.SHELL", "a worker did not start (exit status 127): "),
    ("sandbox.sys.executable = '/nowhere/python'", "a worker did not start (exit status 127): sh: 1: exec: /nowhere/python: not found"),
    ("sandbox.ZYGOTE = sandbox.ZYGOTE.replace('; sys.path.pop()', '; import sandbox, types; '\n"
     "    'sandbox.libc = types.SimpleNamespace(prctl=lambda *a: 1, syscall=lambda *a: 0, capset=print); sys.path.pop()')",
     "a worker did not start (exit status 1): OSError: this Linux has no seccomp filters")])
def test_a_machine_that_lacks_something_is_named_in_one_line(setup, lacks):
    script = start_script([{"code": ADD, "tests": ASSERTS}], setup)
    out, err = script.communicate(timeout=120)
    assert script.returncode == 1 and out == "ready\n" and "roken pipe" not in err
    assert err.strip().rpartition("\n")[2].startswith(f"sandbox.SandboxError: {lacks}"), err


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("setup", ["", "sandbox.WITHOUT.append('Landlock')"])
def test_as_an_ordinary_user(setup, monkeypatch):
    nobody = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"}
    for python in (sys.executable, "/usr/bin/python3"):  # the first may be in a folder of root's
        with contextlib.suppress(OSError):
            code = f"import sys; open({str(ROOT / 'sandbox.py')!r}); sys.exit(sys.version_info < (3, 10))"
            if not subprocess.run([python, "-c", code], **nobody).returncode:
                break
    else:
        pytest.skip("an ordinary user cannot read this Python or this repository")
    monkeypatch.setattr(sys, "executable", python)
    probes = {name: row for name, row in PROBES.items() if name != "numpy"}
    results, _ = run_probes(setup, probes, **nobody)
    assert {name: row[0] for name, row in results.items()} == {name: row[2] for name, row in probes.items()}, results


def test_system_call_numbers_are_this_machines():
    """The table against the kernel's own header, where it is installed."""
    header = next(iter([*Path("/usr/include").glob("*/asm/unistd_64.h"), *Path("/usr/include").glob("asm/unistd_64.h")]), None)
    if header is None or os.uname().machine != "x86_64":
        pytest.skip("no header to compare with")
    defined = dict(line.split()[1:3] for line in header.read_text().splitlines() if line.startswith("#define __NR_"))
    assert {name: int(defined[f"__NR_{name}"]) for name in sandbox.NUMBER} == sandbox.NUMBER


def test_messages_hold_plain_data_only():
    refuse = {"tag": ["eval", "1"], "empty": [], "not a name": [["list"], 1], "growth": ["fractions.Fraction", "1e999999999"],
              "wrong": ["range", "a"], "unhashable": ["set", ["list", 1]]}
    for name in ("eval", "exit", "SystemExit", "BaseException"):
        assert sandbox.unpack(["named", "builtins", name], sandbox.Program(0)) is RuntimeError
    refuse |= {"own": ["yours", 0],
               "objects": ["numpy.ndarray", "|O", ["tuple", 1], ["list", 3]], "shown": ["mine"],
               "code": ["namedtuple", "P", ["tuple", "x=1"], 1], "method": ["datetime.date", 1]}
    for name, message in refuse.items():
        with pytest.raises((ValueError, TypeError, KeyError, IndexError)):
            pytest.fail(f"{name}: {sandbox.unpack(json.loads(json.dumps(message)), sandbox.Program(0))}")


def test_an_interrupt_while_a_worker_starts_does_not_wait_for_its_program(monkeypatch):
    start = sandbox.Worker.start

    def slowly(worker):
        time.sleep(1.0)
        start(worker)

    sandbox.close_workers()
    monkeypatch.setattr(sandbox.Worker, "start", slowly)
    interrupt, begun = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)), time.monotonic()
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        sandbox.run_tests([{"code": "while True: pass", "tests": "assert f()"}], timeout_s=30, workers=1)
    assert time.monotonic() - begun < 20
