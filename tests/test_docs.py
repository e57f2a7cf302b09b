"""What the docs name exists; and the sources use public names of transformers and torch only."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[`([\w.]+)`\]\(\.\./(\w+\.py)(?:#L\d+)?\)")
SCRIPTS = ("ra3.py", "rmt.py", "grpo_rlvr.py", "eval_code.py")
SOURCES = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py")), *sorted((ROOT / "tiny").glob("*.py"))]


def defined(tree: ast.Module) -> set[str]:
    """Names that a file defines: functions, classes, `Class.name` (methods, fields), constants."""
    names = set()
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        for prefix, statement in [("", node), *((f"{node.name}.", one) for one in inner)]:
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            found = [target.id for target in targets if isinstance(target, ast.Name)]
            names |= {prefix + name for name in [*found, getattr(statement, "name", None)] if name}
    return names


@functools.cache
def all_names() -> tuple[set[str], set[str]]:
    """Words of the sources; flags of the scripts, and of the programs that the docs start with them."""
    trees = [ast.parse(path.read_text()) for path in SOURCES]
    fields = {name.removeprefix("Args.") for tree in trees for name in defined(tree) if name.startswith("Args.")}
    others = {"--help", "--nproc_per_node", "--nnodes", "--standalone"} | {f"--no-{f.replace('_', '-')}" for f in fields}
    others |= set(re.findall(r"--[a-z][\w-]+", "".join(p.read_text() for p in SOURCES)))
    outside = {"em_001_q", "algorithmic_corpus"}  # a folder, a data set
    return outside | set(re.findall(r"\w+", "".join(path.read_text() for path in SOURCES))), {f"--{f.replace('_', '-')}" for f in fields} | others


def missing(text: str) -> list[str]:
    """What a page names that is not there: links [`name`](../file.py), other `snake_case` names, `--flags`."""
    found = []
    for name, file in LINK.findall(text):
        source = ROOT / file
        if not source.exists() or name.removeprefix(file[:-2]) not in defined(ast.parse(source.read_text())):
            found.append(f"{file}: {name}")
    words, flags = all_names()
    code = re.findall(r"`([^`\n]+)`", LINK.sub("", text)) + re.findall(r"(?:^    |```)(.*)$", text, flags=re.MULTILINE)
    found += [name for name in code if re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", name) and name not in words]
    return found + [flag for line in code for flag in re.findall(r"(?<!\S)--[a-z][\w-]+", line) if flag not in flags]


@pytest.mark.parametrize("name", [path.name for path in (ROOT / "docs").glob("*.md") if path.name != "theory.md"] + ["../README.md"])
def test_pages_name_what_exists(name):
    text = (ROOT / "docs" / name).read_text()
    assert missing(text) == []
    assert not re.search(r"\.py#L\d+", text), "line numbers go out of date: link to the file"


def test_a_name_that_is_gone_is_found():
    page = "[`Args`](../ra3.py) [`SnippetStream.batch`](../ra3.py) [`gone`](../ra3.py) [`f`](../none.py) `ntp_loss` `ntp_gone` `--algo ntp --none 1`"
    assert missing(page) == ["ra3.py: gone", "none.py: f", "ntp_gone", "--none"]


def test_the_end_of_ra3_names_the_readme_s_result_of_ntp():
    (row,) = re.findall(r"^\| first base model.*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    scores = [float(score) for score in row.split("|")[3].split(",")]  # of NTP, one a seed
    said = f"(--algo ntp) ends with pass@1 {min(scores):.2f} to {max(scores):.2f}, see README.md"
    assert said in (ROOT / "ra3.py").read_text()


def test_theory_md_names_the_tests():
    tests = {name for name in defined(ast.parse((ROOT / "tests" / "test_theory.py").read_text())) if name.startswith("test_")}
    named = re.findall(r"`(\w+)(…?)` \|", (ROOT / "docs" / "theory.md").read_text())
    of = [{test for test in tests if test == f"test_{name}" or more and test.startswith(f"test_{name}")} for name, more in named]
    assert len(named) > 20 and all(len(one) == 1 for one in of) and set.union(*of) == tests


# ---------------------------------------------------------------- the house


def faults(source: str, name: str = "x.py") -> list[str]:
    """What a source may not do, with its line."""
    found, tree = [], ast.parse(source)
    foreign = re.search(r"^(from|import) (torch|transformers|common)\b", source, flags=re.MULTILINE) or name in SCRIPTS
    for node in ast.walk(tree):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            top = (module or "").split(".")[0]
            if top == "transformers" and module != "transformers":
                found.append(f"{name}:{node.lineno} imports {module}, a submodule of transformers")
            if top in ("transformers", "torch") and "._" in module:
                found.append(f"{name}:{node.lineno} imports {module}, which is private")
            ours = {f[:-3] for f in (*SCRIPTS, "sandbox.py")} | {"modeling", "snippets", "texts", "problems"}
            if name in (*SCRIPTS, "common.py") and top in ours:
                run_tests = name == "common.py" and top == "sandbox" or name == "eval_code.py" and top == "sandbox"
                found += [] if run_tests else [f"{name}:{node.lineno} imports {top}: only common, and its run_tests"]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("transformers", "torch"):
            found += [f"{name}:{node.lineno} imports {a.name}, which is private" for a in node.names if a.name.startswith("_")]
        if foreign and isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            own = ast.unparse(node.value) in ("self", "cls", "os", "sys")
            found += [] if own else [f"{name}:{node.lineno} {ast.unparse(node)} is private"]
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("transformers.") and node.attr in ("models", "modeling_utils", "cache_utils", "masking_utils"):
            found.append(f"{name}:{node.lineno} {ast.unparse(node)} is a submodule of transformers")
        if isinstance(node, ast.ClassDef):
            bases = [b for b in map(ast.unparse, node.bases) if re.search(r"Cache|Attention|DecoderLayer|PreTrainedModel|ForCausalLM", b)]
            found += [f"{name}:{node.lineno} {node.name} is a subclass of {b}" for b in bases]
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else []
        targets = [part for target in targets for part in ast.walk(target)]
        replaced = {"forward", "__call__", "generate", "update", "prepare_inputs_for_generation"}
        found += [f"{name}:{t.lineno} replaces {ast.unparse(t)}" for t in targets if isinstance(t, ast.Attribute) and t.attr in replaced]
        called = isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and len(node.args) > 1
        if called and isinstance(node.args[1], ast.Constant) and node.args[1].value in replaced:
            found.append(f"{name}:{node.lineno} replaces {node.args[1].value}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "from transformers.cache_utils import DynamicLayer", "import transformers.masking_utils", "from torch._dynamo import x",
        "from transformers import _x", "import snippets", "from problems import read", "import sandbox", "model._sample(1)",
        "transformers.cache_utils.Cache", "class A(DynamicCache): pass", "class A(transformers.Cache): pass", "class A(LlamaAttention): pass",
        "layer.forward = f", "a, layer.self_attn.forward = f, g", "setattr(layer, 'forward', f)", "model.generate = f",
    ],
)  # fmt: skip
def test_the_reader_of_sources_sees(source):
    assert len(faults(source, "ra3.py")) == 1


def test_the_reader_of_sources_lets_pass():
    fine = "import torch.distributed.checkpoint as dcp\nfrom common import run_tests\nself._x = os._exit\ncls._y()\ntransformers.utils.logging.x()"
    assert faults(fine, "ra3.py") == [] == faults("from sandbox import run_tests", "common.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_use_public_names_only(path):
    assert faults(path.read_text(), path.name) == []


def test_the_root_holds_six_python_files():
    assert {path.name for path in ROOT.glob("*.py")} == {*SCRIPTS, "common.py", "sandbox.py"}
