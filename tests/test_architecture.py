"""The shape of the source, read with `ast`: which way imports point, who knows Ray, and what no function may do.

Every rule is a function from a parsed module to a list of violations, and is itself tested on snippets that break it.
Left out: what only running the code can show, and what ruff and mypy already refuse.
"""

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from raysim.methods.spec import METHODS
from raysim.results import files

PACKAGE = Path(__file__).resolve().parent.parent / "raysim"

# A module may import its own layer and the layers before it. `raysim` is the package's own __init__, what users import.
# `methods.spec` and `lora.spec` are data about methods and rules, which the configuration reads; those themselves stand above.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("rng", "errors", "imports", "storage", "remote", "methods.spec", "lora.spec"),
    ("config", "console"),
    ("data", "lora", "privacy"),
    ("model",),
    ("attacks", "methods"),
    ("measure", "judging"),
    ("federation",),
    ("federation.on_ray",),
    ("results",),
    ("reports", "claims"),
    ("runs",),
    ("sweeps",),
    ("commands",),
    ("cli",),
    ("raysim", "__main__"),
)
LAYER_OF = {name: depth for depth, names in enumerate(LAYERS) for name in names}

MAY_IMPORT_RAY = ("raysim.federation.on_ray", "raysim.sweeps.tune", "raysim.commands", "raysim.cli")
MAX_FUNCTION_LINES = 60

# Algorithms are functions of tensors and numbers: these, with what lies under them, receive plain values.
WITHOUT_CONFIG = (
    "raysim.attacks",
    "raysim.judging",
    "raysim.lora",
    "raysim.measure.options",
    "raysim.model",
    "raysim.privacy.accounting",
    "raysim.privacy.clipping",
    "raysim.privacy.noise",
)

# (module, what it imports inside a function) -> why it is heavy and optional.
HIDDEN_IMPORTS: dict[tuple[str, str], str] = {
    ("raysim", "raysim.runs.compare"): "torch and Ray take seconds to import, and who only reads configurations needs neither",
    ("raysim", "raysim.runs.run"): "torch and Ray take seconds to import, and who only reads configurations needs neither",
    ("raysim.cli", "raysim.commands.audit"): "help and refusals answer without importing torch and Ray",
    ("raysim.cli", "raysim.claims.page"): "help and refusals answer without importing matplotlib",
    ("raysim.cli", "raysim.commands.budget"): "the other commands answer without importing dp-accounting and scipy",
    ("raysim.cli", "raysim.commands.plan"): "help and refusals answer without importing torch",
    ("raysim.cli", "raysim.commands.rules"): "the other commands answer without importing torch and scipy",
    ("raysim.cli", "raysim.sweeps.sweep"): "help and refusals answer without importing torch and Ray",
    ("raysim.cli", "raysim.results.verify"): "the other commands answer without importing dp-accounting and scipy",
    ("raysim.commands.budget", "raysim.reports.figures"): "matplotlib: a second, and only who asks for a picture draws one",
    ("raysim.cli", "raysim.sweeps.page"): "help and refusals answer without importing matplotlib",
    ("raysim.cli", "raysim.reports.page"): "help and refusals answer without importing matplotlib",
    ("raysim.cli", "raysim.results.files"): "help and refusals answer without importing torch",
    ("raysim.cli", "raysim.results.folders"): "help and refusals answer without importing torch",
    ("raysim.cli", "raysim.runs.compare"): "help and refusals answer without importing torch and Ray",
    ("raysim.cli", "raysim.reports.tables"): "help and refusals answer without importing matplotlib",
    ("raysim.cli", "raysim.runs.run"): "help and refusals answer without importing torch and Ray",
    (
        "raysim.methods.registry",
        "raysim.methods.{spec.function or f'{name}:{name}'}",
    ): "a new method is its own file and its entry in spec.py",
    ("raysim.model.sharded", "deepspeed"): "seconds, and only train.engine=deepspeed needs it",
    ("raysim.model.quantize", "bitsandbytes"): "a second, and only quantised bases need it",
    ("raysim.model.find", "huggingface_hub"): "only a model that is not on this machine is fetched from the Hub",
    ("raysim.remote", "fsspec"): "only a folder in a bucket needs it",
    ("raysim.results.inputs", "huggingface_hub"): "only a model that is named by a Hub id has a cache to look into",
    (
        "raysim.lora.rule",
        "raysim.lora.rules.{name}",
    ): "a rule is found by its name, so that a new one is a file and a name in the list of choices",
    ("raysim.data.partition", "sklearn.cluster"): "pandas and pyarrow come with it; only sets without labels are clustered",
    ("raysim.federation.robust", "sklearn.cluster"): "with pandas and pyarrow, 100 MB that only the rule FLAME needs",
    ("raysim.data.files", "pyarrow"): "100 MB, and only Parquet files need it",
    ("raysim.data.files", "pyarrow.parquet"): "100 MB, and only Parquet files need it",
    ("raysim.data.files", "datasets"): "seconds to import, and only data.source=hub reads a data set from the Hub",
}

# Outside raysim/methods a trait is asked for, never a name: module -> (the names that it may hold, why). May shrink, never grow.
METHOD_NAMES: dict[str, tuple[set[str], str]] = {
    "raysim.config.schema": ({"dplora", "fedpit"}, "the values of `claims`, which are called after the papers"),
    "raysim.claims.papers": (
        {"fedit", "fedpit"},
        "entries of published comparisons, called after the methods that they run",
    ),
    "raysim.claims.page": (
        {"base", "cenit", "dplora", "fedit", "fedmit", "fedpit", "fewfedweight", "locit"},
        "draws the entries of published comparisons",
    ),
}

# The files of runs, comparisons and sweeps: `results` writes and reads them, and is alone to know their names.
RUN_FILES = {
    value
    for value in vars(files).values()
    if isinstance(value, str) and value.endswith((".json", ".jsonl", ".yaml", ".csv", ".html", "claims.md"))
}

# A room or module that says such a name all the same -> why.
FILE_NAMES = {
    "raysim.config": "an entry of a comparison is a folder beside these files, so it may not have their names; the files lie floors above",
    "raysim.federation.loop": "a line of progress tells the user in which file to look",
}

# A module that writes files by itself -> why.
WRITERS = {
    "raysim.storage": "the one place through which folders of results are written",
    "raysim.remote": "notes what a bucket has, beside a copy of its folder that is gone afterwards",
    "raysim.judging.journal": "appends to a file, line by line, each on the disk before it counts",
    "raysim.model.find": "keeps converted models in a cache outside folders of results, where others may have theirs",
    "raysim.model.language_model": "gives a tokenizer its files in a folder that is gone afterwards",
    "raysim.federation.on_ray.cluster": "opens the null device",
    "raysim.cli": "opens the null device",
}
WRITING_CALLS = {"save_file", "savefig", "write_text", "write_bytes", "touch", "NamedTemporaryFile", "mkstemp"}

# numpy.random and random hold these beside the functions that draw from the hidden global generator.
NO_GLOBAL_STATE = {
    "numpy.random": {"default_rng", "Generator", "SeedSequence", "BitGenerator", "PCG64", "Philox"},
    "random": {"Random", "SystemRandom"},
}
TORCH_SEEDERS = {
    "torch.manual_seed",
    "torch.seed",
    "torch.random.manual_seed",
    "torch.random.seed",
    "torch.default_generator.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "torch.set_rng_state",
    "transformers.set_seed",
    "accelerate.utils.set_seed",
}
TORCH_DRAWS = {f"torch.{name}" for name in ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial")}
TORCH_DRAWS_WITHOUT_GENERATOR = {"torch.rand_like", "torch.randn_like", "torch.randint_like", "torch.poisson"}
TENSOR_DRAWS = {"normal_", "uniform_", "bernoulli_", "exponential_", "random_", "log_normal_", "geometric_", "cauchy_"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


# --- what is there


def module_name(path: Path) -> str:
    """The dotted name of a source file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> dict[str, Path]:
    """Every module of the package with its file."""
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


FILES = source_files()
MODULES = set(FILES)
PACKAGES = {module_name(path) for path in PACKAGE.rglob("__init__.py")}


@cache
def parse(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(FILES[module].read_text(), filename=str(FILES[module]))


# --- imports


def imported(node: ast.Import | ast.ImportFrom, module: str) -> list[str]:
    """The modules that an import statement of `module` names, relative ones resolved.

    `from raysim.privacy import noise` names `raysim.privacy.noise` where that is a module, else `raysim.privacy`.
    """
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parents = module.split(".")
        kept = parents[: len(parents) - node.level + (module in PACKAGES)]
        base = ".".join([*kept, base] if base else kept)
    return [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]


def imports_of(tree: ast.AST, module: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """Every import in the tree with each module it names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in imported(node, module):
                yield node, name


def layer_name(module: str) -> str:
    """The name by which a module stands in LAYERS: `raysim.privacy.noise` is `privacy`, `raysim.federation.on_ray.clients` is `federation.on_ray`."""
    parts = module.split(".")[1:] or [module]
    return next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in LAYER_OF), parts[0])


def room(module: str) -> str:
    """The package right below `raysim` in which a module lies, or its own name where it lies in none; a floor within a package is a room of its own."""
    return f"raysim.{name}" if (name := layer_name(module)) in LAYER_OF and module != "raysim" else ".".join(module.split(".")[:2])


def wrong_directions(tree: ast.Module, module: str) -> list[str]:
    """Imports of a layer above the module's own, and modules that have no layer."""
    if layer_name(module) not in LAYER_OF:
        return [f"{module} stands in no layer"]
    own = LAYER_OF[layer_name(module)]
    found = []
    for node, name in imports_of(tree, module):
        if name.split(".")[0] != "raysim" or _is_version(node, name):
            continue
        if LAYER_OF.get(layer_name(name), own + 1) > own:
            found.append(f"line {node.lineno}: {module} imports {name}, which is above it")
    return found


def _is_version(node: ast.Import | ast.ImportFrom, name: str) -> bool:
    return name == "raysim" and isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] == ["__version__"]


def ray_imports(tree: ast.Module, module: str) -> list[str]:
    """Imports of Ray by a module that must not know it."""
    if any(module == name or module.startswith(f"{name}.") for name in MAY_IMPORT_RAY):
        return []
    return [f"line {node.lineno}: {module} imports {name}" for node, name in imports_of(tree, module) if name.split(".")[0] == "ray"]


def config_imports(tree: ast.Module, module: str) -> list[str]:
    """Imports of the configuration by an algorithm."""
    if not any(module == name or module.startswith(f"{name}.") for name in WITHOUT_CONFIG):
        return []
    return [f"line {node.lineno}: {module} imports {name}" for node, name in imports_of(tree, module) if name == "raysim.config"]


def hidden(tree: ast.Module, module: str) -> list[tuple[int, str]]:
    """Line and module of every import that is made inside a function, by statement or by call."""
    found, names = [], aliases(tree)
    for function in functions(tree):
        found += [(node.lineno, name) for node, name in imports_of(function, module)]
        for call in calls(function):
            if dotted(call.func, names) in ("importlib.import_module", "pkgutil.resolve_name", "__import__"):
                found.append((call.lineno, ast.unparse(call.args[0]).removeprefix("f").strip("'\"") if call.args else "?"))
    return sorted(set(found))


def hidden_imports(tree: ast.Module, module: str) -> list[str]:
    """Imports inside functions that HIDDEN_IMPORTS gives no reason for."""
    return [
        f"line {line}: {module} imports {name} inside a function"
        for line, name in hidden(tree, module)
        if (module, name) not in HIDDEN_IMPORTS
    ]


def known_imports(module: str) -> set[str]:
    """The modules of the package that `module` imports; its version, a constant, makes no dependency."""
    return {name for node, name in imports_of(parse(module), module) if name in MODULES and not _is_version(node, name)}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import cycle, or none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


# --- functions and calls


def functions(tree: ast.AST) -> list[Function]:
    """Every function and method, nested ones too."""
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def calls(tree: ast.AST) -> list[ast.Call]:
    """Every call."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def aliases(tree: ast.Module) -> dict[str, str]:
    """What a local name stands for: `import numpy as np` gives np -> numpy."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The full dotted name of what an expression refers to, or an empty string: `np.random.rand` is numpy.random.rand."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, names)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def long_functions(tree: ast.Module, module: str) -> list[str]:
    """Functions that are longer than MAX_FUNCTION_LINES, docstring included."""
    found = []
    for function in functions(tree):
        assert function.end_lineno is not None
        num_lines = function.end_lineno - function.lineno + 1
        if num_lines > MAX_FUNCTION_LINES:
            found.append(f"line {function.lineno}: {module}.{function.name} has {num_lines} lines")
    return found


def method_names(tree: ast.Module, module: str) -> list[tuple[int, str]]:
    """Line and name of every text that is a method's name, and nothing else: compared with, listed, a key, or a default."""
    if module.startswith("raysim.methods."):
        return []
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [(node.lineno, str(node.value)) for node in texts if node.value in METHODS]


def known_methods(tree: ast.Module, module: str) -> list[str]:
    """Names of methods for which METHOD_NAMES gives no reason."""
    excused, _ = METHOD_NAMES.get(module, (set[str](), ""))
    return [f"line {line}: {module} knows the method {name}" for line, name in method_names(tree, module) if name not in excused]


def guessed_attributes(tree: ast.Module, module: str) -> list[str]:
    """Calls of hasattr, and of getattr with a default."""
    found = []
    for call in calls(tree):
        if isinstance(call.func, ast.Name) and (call.func.id == "hasattr" or (call.func.id == "getattr" and len(call.args) > 2)):
            found.append(f"line {call.lineno}: {module} calls {ast.unparse(call)}")
    return found


def global_randomness(tree: ast.Module, module: str) -> list[str]:
    """Uses of a hidden global generator, save inside `with torch.random.fork_rng()`, which puts its state back."""
    names = aliases(tree)
    inside_fork = {id(call) for node in ast.walk(tree) if _is_fork(node, names) for call in calls(node)}
    return [
        f"line {call.lineno}: {module} calls {ast.unparse(call.func)}"
        for call in calls(tree)
        if draws_globally(call, names) and id(call) not in inside_fork
    ]


def _is_fork(node: ast.AST, names: dict[str, str]) -> bool:
    if not isinstance(node, ast.With):
        return False
    contexts = [item.context_expr for item in node.items]
    return any(isinstance(c, ast.Call) and dotted(c.func, names) == "torch.random.fork_rng" for c in contexts)


def draws_globally(call: ast.Call, names: dict[str, str]) -> bool:
    """Whether a call draws from, or seeds, a generator that belongs to no one."""
    name = dotted(call.func, names)
    owner, _, leaf = name.rpartition(".")
    has_generator = any(keyword.arg == "generator" for keyword in call.keywords)
    if owner in NO_GLOBAL_STATE:
        return leaf not in NO_GLOBAL_STATE[owner]
    if name in TORCH_SEEDERS | TORCH_DRAWS_WITHOUT_GENERATOR:
        return True
    if isinstance(call.func, ast.Attribute) and call.func.attr in TENSOR_DRAWS:
        return not has_generator
    return name in TORCH_DRAWS and not has_generator


def lines_of_files(tree: ast.Module, module: str) -> list[str]:
    """Calls of splitlines, which also ends a line at characters that stand in texts; of a message, its first line is taken by index at once."""
    firsts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    return [
        f"line {call.lineno}: {module} calls {ast.unparse(call)}"
        for call in calls(tree)
        if isinstance(call.func, ast.Attribute) and call.func.attr == "splitlines" and (id(call) not in firsts or _reads(call.func.value))
    ]


def _reads(node: ast.AST) -> bool:
    return any(isinstance(call.func, ast.Attribute) and call.func.attr.startswith("read") for call in calls(node))


def unsaid_encodings(tree: ast.Module, module: str) -> list[str]:
    """Text files that are read, written or opened without saying `encoding`, which would be the machine's own."""
    return [
        f"line {call.lineno}: {module} calls {ast.unparse(call)}"
        for call in calls(tree)
        if _opens_text(call) and not any(keyword.arg == "encoding" for keyword in call.keywords)
    ]


def _opens_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""
    if name == "open":
        modes = [arg.value for arg in (*call.args, *(k.value for k in call.keywords)) if isinstance(arg, ast.Constant)]
        return not any(isinstance(mode, str) and "b" in mode for mode in modes) and "os.open" not in ast.unparse(call.func)
    if name not in ("read_text", "write_text") or not isinstance(call.func, ast.Attribute):
        return False
    return name == "read_text" or ast.unparse(call.func.value) not in ("files", "runfiles", "storage")


def named_run_files(tree: ast.Module, module: str) -> list[str]:
    """Names of files of runs in strings, docstrings apart, outside `results`."""
    if module.startswith(("raysim.results", *FILE_NAMES)):
        return []
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        f"line {node.lineno}: {module} names {name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said
        for name in sorted(RUN_FILES)
        if re.search(rf"(?<![\w.-]){re.escape(name)}(?!\w)", node.value)
    ]


def writes(tree: ast.Module, module: str) -> list[str]:
    """Files that are written elsewhere than in `storage`, so that a full disk or a crash could leave a part of one."""
    return [
        f"line {call.lineno}: {module} calls {ast.unparse(call.func)}" for call in calls(tree) if module not in WRITERS and _writes(call)
    ]


def _writes(call: ast.Call) -> bool:
    if not isinstance(call.func, ast.Attribute):
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        return name == "save_file" or (name == "open" and _opens_to_write(call))
    name, owner = call.func.attr, ast.unparse(call.func.value)
    if name in ("write_text", "write_bytes"):
        return owner not in ("storage", "files", "runfiles")
    if name == "savefig":
        return "buffer" not in ast.unparse(call)
    return (name == "open" and (owner == "os" or _opens_to_write(call))) or name in WRITING_CALLS


def _opens_to_write(call: ast.Call) -> bool:
    modes = [arg.value for arg in (*call.args, *(k.value for k in call.keywords)) if isinstance(arg, ast.Constant)]
    return any(isinstance(mode, str) and set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in modes)


Rule = Callable[[ast.Module, str], list[str]]
RULES: dict[str, Rule] = {
    "imports point one way": wrong_directions,
    "Ray stays in its modules": ray_imports,
    "algorithms receive plain values": config_imports,
    "no hidden imports": hidden_imports,
    "functions fit a screen": long_functions,
    "methods are known by their traits": known_methods,
    "no guessed attributes": guessed_attributes,
    "no global randomness": global_randomness,
    "lines end at line feeds": lines_of_files,
    "text files say their encoding": unsaid_encodings,
    "one room knows the files of runs": named_run_files,
    "one place writes files": writes,
}


# --- the package


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_the_package_keeps(rule: Rule) -> None:
    assert len(FILES) > 50
    assert [line for module in FILES for line in rule(parse(module), module)] == []


def test_no_import_cycle() -> None:
    graph = {module: known_imports(module) for module in FILES}
    assert sum(map(len, graph.values())) > 0
    assert cycle(graph) == []


def test_no_cycle_between_packages() -> None:
    graph: dict[str, set[str]] = {}
    for module in FILES:
        graph.setdefault(room(module), set()).update(room(name) for name in known_imports(module) if room(name) != room(module))
    assert len(graph) > 10
    assert cycle(graph) == []


def test_every_excuse_for_naming_a_file_of_a_run_is_used() -> None:
    assert {"rounds.jsonl", "ledger.json", "results.csv", "claims.md"} <= RUN_FILES
    for excused in FILE_NAMES:
        assert any(name in FILES[module].read_text() for module in FILES if module.startswith(excused) for name in RUN_FILES), excused


def test_every_excuse_for_writing_a_file_is_used() -> None:
    for module in WRITERS:
        assert any(_writes(call) for call in calls(parse(module))), module


def test_every_excuse_for_a_hidden_import_is_used() -> None:
    used = {(module, name) for module in FILES for _, name in hidden(parse(module), module)}
    assert set(HIDDEN_IMPORTS) <= used


def test_every_excuse_for_a_method_s_name_is_used() -> None:
    used = {module: {name for _, name in method_names(parse(module), module)} for module in FILES}
    assert {module: names for module, names in used.items() if names} == {module: names for module, (names, _) in METHOD_NAMES.items()}


def test_what_the_configuration_reads_of_methods_imports_nothing() -> None:
    for module in ("raysim.methods", "raysim.methods.spec"):
        assert {name for _, name in imports_of(parse(module), module)} <= {"collections.abc", "dataclasses"}


# --- the rules themselves

LONG = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
BREAKS: list[tuple[Rule, str, str]] = [
    (wrong_directions, "raysim.model.train", "from raysim.federation.loop import simulate"),
    (wrong_directions, "raysim.model.train", "import raysim.federation.loop"),
    (wrong_directions, "raysim.model.train", "from raysim import cli"),
    (wrong_directions, "raysim.model.train", "from raysim import run"),
    (wrong_directions, "raysim.model.train", "from ..federation.server import step"),
    (wrong_directions, "raysim.privacy.noise", "from ..model.train import load"),
    (wrong_directions, "raysim.privacy", "from ..model.train import load"),
    (wrong_directions, "raysim.config", "def f():\n    from raysim.data import sources"),
    (wrong_directions, "raysim.federation.loop", "from raysim.federation.on_ray.clients import RayClients"),
    (wrong_directions, "raysim.model.train", "from raysim.nowhere import f"),
    (wrong_directions, "raysim.nowhere", "import math"),
    (ray_imports, "raysim.federation.loop", "import ray"),
    (ray_imports, "raysim.federation.loop", "from ray.util import placement_group"),
    (ray_imports, "raysim.model.train", "def f():\n    import ray.tune as tune"),
    (config_imports, "raysim.model.train", "from raysim.config import TrainConfig"),
    (config_imports, "raysim.attacks.extraction", "from raysim import config"),
    (config_imports, "raysim.attacks", "from .. import config"),
    (hidden_imports, "raysim.model.train", "def f():\n    import pandas"),
    (hidden_imports, "raysim.model.train", "class A:\n    def f(self):\n        from raysim.model.language_model import load"),
    (hidden_imports, "raysim.model.train", "import importlib\ndef f():\n    importlib.import_module('pandas')"),
    (hidden_imports, "raysim.model.train", "def f():\n    return __import__('pandas')"),
    (hidden_imports, "raysim.model.train", "from importlib import import_module\nasync def f(x):\n    import_module(x)"),
    (long_functions, "raysim.model.train", LONG),
    (long_functions, "raysim.model.train", "class A:\n" + "\n".join("    " + line for line in LONG.splitlines())),
    (hidden_imports, "raysim.methods.registry", "import pkgutil\ndef f(name):\n    return pkgutil.resolve_name(name)"),
    (known_methods, "raysim.model.train", "if method.name == 'fedit': pass"),
    (known_methods, "raysim.model.train", "if 'base' != method.name: pass"),
    (known_methods, "raysim.model.train", "if config.method.name in ('locit', 'other'): pass"),
    (known_methods, "raysim.model.train", "LABELS = {'cenit': 'CENIT', 'other': 'Other'}"),
    (known_methods, "raysim.model.train", "match name:\n    case 'dplora':\n        pass"),
    (known_methods, "raysim.model.train", "f(method['fedpit'])"),
    (known_methods, "raysim.config.schema", "if config.method.name == 'base': pass"),
    (guessed_attributes, "raysim.model.train", "getattr(x, 'y', None)"),
    (guessed_attributes, "raysim.model.train", "if hasattr(x, 'y'): pass"),
    (lines_of_files, "raysim.model.train", "for line in text.splitlines(): pass"),
    (lines_of_files, "raysim.model.train", "first = path.read_text().splitlines()[0]"),
    (lines_of_files, "raysim.model.train", "rows = file.read().splitlines()"),
    (named_run_files, "raysim.claims.page", "read_json(folder / 'ledger.json')"),
    (named_run_files, "raysim.runs.run", "path = f'{out}/rounds.jsonl'"),
    (writes, "raysim.claims.page", "path.write_text(text, encoding='utf-8')"),
    (writes, "raysim.claims.page", "path.write_bytes(content)"),
    (writes, "raysim.claims.page", "with open(path, 'w', encoding='utf-8') as file: pass"),
    (writes, "raysim.claims.page", "with path.open('ab') as file: pass"),
    (writes, "raysim.claims.page", "save_file(tensors, path)"),
    (writes, "raysim.claims.page", "figure.savefig(path)"),
    (writes, "raysim.claims.page", "os.open(path, os.O_WRONLY)"),
    (unsaid_encodings, "raysim.model.train", "text = path.read_text()"),
    (unsaid_encodings, "raysim.model.train", "path.write_text(text)"),
    (unsaid_encodings, "raysim.model.train", "open(path)"),
    (unsaid_encodings, "raysim.model.train", "with path.open('w', newline='') as file: pass"),
    (global_randomness, "raysim.model.train", "import numpy as np\nnp.random.seed(0)"),
    (global_randomness, "raysim.model.train", "import numpy\nnumpy.random.normal()"),
    (global_randomness, "raysim.model.train", "from numpy.random import shuffle\nshuffle(x)"),
    (global_randomness, "raysim.model.train", "from numpy import random as npr\nnpr.rand(3)"),
    (global_randomness, "raysim.model.train", "import random\nrandom.seed(1)"),
    (global_randomness, "raysim.model.train", "from random import choice\nchoice([1])"),
    (global_randomness, "raysim.model.train", "import torch\ntorch.manual_seed(0)"),
    (global_randomness, "raysim.model.train", "import torch\ntorch.default_generator.manual_seed(0)"),
    (global_randomness, "raysim.model.train", "import torch\ntorch.randn(3)"),
    (global_randomness, "raysim.model.train", "import torch\ntorch.randn_like(x)"),
    (global_randomness, "raysim.model.train", "x.normal_(0, 1)"),
    (global_randomness, "raysim.model.train", "from transformers import set_seed\nset_seed(0)"),
    (global_randomness, "raysim.model.train", "import torch\nwith torch.random.fork_rng():\n    pass\ntorch.manual_seed(0)"),
]
KEEPS: list[tuple[Rule, str, str]] = [
    (
        wrong_directions,
        "raysim.model.train",
        "from raysim.model.language_model import load\nfrom raysim.config import Config\nimport torch",
    ),
    (wrong_directions, "raysim.model.train", "from raysim import __version__"),
    (wrong_directions, "raysim.model.train", "from raysim import rng"),
    (wrong_directions, "raysim.privacy.noise", "from .clipping import clip\nfrom ..rng import seed_for"),
    (wrong_directions, "raysim", "from raysim.cli import run"),
    (ray_imports, "raysim.federation.on_ray.clients", "import ray"),
    (ray_imports, "raysim.model.train", "import raytracer\nfrom raysim import rng"),
    (config_imports, "raysim.federation.loop", "from raysim.config import Config"),
    (config_imports, "raysim.model.train", "from raysim.rng import seed_for"),
    (hidden_imports, "raysim.model.train", "import pandas\ntry:\n    import torch\nexcept ImportError:\n    raise"),
    (hidden_imports, "raysim.model.find", "def f():\n    from huggingface_hub import snapshot_download"),
    (long_functions, "raysim.model.train", "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)),
    (known_methods, "raysim.model.train", "if spec.pools: raise ValueError(f'use method.name=fedit, not {name}')"),
    (known_methods, "raysim.methods.spec", "DEFAULT = 'fedit'"),
    (guessed_attributes, "raysim.model.train", "getattr(x, name)"),
    (lines_of_files, "raysim.model.train", "first = str(error).splitlines()[0]\nlines = text.split('\\n')"),
    (unsaid_encodings, "raysim.model.train", "path.read_text(encoding='utf-8')\npath.open('rb')\nopen(path, mode='rb')\nos.open(path, 0)"),
    (unsaid_encodings, "raysim.model.train", "write_text(path, text)\nfiles.write_text(path, text)\npath.read_bytes()"),
    (
        writes,
        "raysim.claims.page",
        "files.write_text(path, text)\nstorage.write_bytes(path, b'')\npath.open('rb')\nopen(path, encoding='utf-8')",
    ),
    (writes, "raysim.claims.page", "figure.savefig(buffer, format='svg')\nwrite_text(path, 'w')"),
    (writes, "raysim.storage", "os.open(path, os.O_WRONLY)"),
    (
        named_run_files,
        "raysim.claims.page",
        "'The page says what ledger.json holds.'\nread_json(folder / files.LEDGER)\npath = 'my-ledger.json'",
    ),
    (named_run_files, "raysim.results.folders", "read_json(folder / 'ledger.json')"),
    (global_randomness, "raysim.model.train", "import numpy as np\nnp.random.default_rng(0).normal()"),
    (global_randomness, "raysim.model.train", "import torch\ntorch.randn(3, generator=g)\nx.normal_(generator=g)"),
    (global_randomness, "raysim.model.train", "import torch\ntorch.Generator().manual_seed(0)"),
    (global_randomness, "raysim.model.train", "import random\nrandom.Random(0).shuffle(x)"),
    (
        global_randomness,
        "raysim.model.train",
        "import torch\nwith torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)\n    torch.rand(2)",
    ),
]


@pytest.mark.parametrize(("rule", "module", "source"), BREAKS)
def test_a_rule_finds_what_breaks_it(rule: Rule, module: str, source: str) -> None:
    assert len(rule(ast.parse(source), module)) == 1


@pytest.mark.parametrize(("rule", "module", "source"), KEEPS)
def test_a_rule_leaves_alone_what_keeps_it(rule: Rule, module: str, source: str) -> None:
    assert rule(ast.parse(source), module) == []


def test_a_cycle_is_found() -> None:
    assert set(cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
