"""What may run code that came with a file, or a shell, is written nowhere in the package or the examples."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "prefero").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])

MODULES = {"pickle", "_pickle", "cPickle", "marshal", "dill", "cloudpickle", "shelve", "joblib"}
NAMES = {"eval", "exec", "__import__"}
CALLS = {"os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"}
ALLOWED_IMPORTS = {"pickle": {"UnpicklingError"}}  # an error has to be named to be turned into a readable one


def offences(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").partition(".")[0]
            names = {alias.name for alias in node.names} - ALLOWED_IMPORTS.get(module, set())
            if module in MODULES and names:
                yield f"from {module} import {', '.join(sorted(names))}"
            # A banned function under a name of its own would pass the check of calls.
            yield from (f"from {module} import {n}" for n in sorted(names) if f"{module}.{n}" in {*CALLS, "torch.load"})
        elif isinstance(node, ast.Call):
            yield from _call_offences(node)


def _call_offences(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}

    def says(key: str, value: object) -> bool:
        given = keywords.get(key)
        return isinstance(given, ast.Constant) and given.value is value

    if name in NAMES or name.removeprefix("builtins.") in NAMES or name in CALLS:
        yield name
    if name == "torch.load" and not says("weights_only", True):
        yield "torch.load without weights_only=True"
    if name.rpartition(".")[2] in {"load", "loads"} and says("allow_pickle", True):
        yield f"{name}(allow_pickle=True)"
    for key in ("trust_remote_code", "shell"):
        if says(key, True):
            yield f"{name}({key}=True)"


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(ROOT)) for file in FILES])
def test_nothing_banned_is_written(file: Path) -> None:
    assert list(offences(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import dill.source",
        "from pickle import loads",
        "from cloudpickle import dumps",
        "from shelve import open",
        "def f():\n    import marshal",
        "eval('1')",
        "builtins.exec(code)",
        "__import__('os')",
        "os.system('ls')",
        "from os import system",
        "subprocess.run(x, shell=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "from yaml import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_guard_sees(source: str) -> None:
    assert list(offences(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "from pickle import UnpicklingError",
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(text)",
        "build(trust_remote_code=options.trust_remote_code)",
        "subprocess.run([sys.executable, '-m', 'pip'])",
    ],
)
def test_the_guard_lets_pass(source: str) -> None:
    assert not list(offences(source))
