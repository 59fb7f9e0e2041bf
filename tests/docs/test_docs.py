"""The documentation is true: its code runs, its configs load, its commands and links exist."""

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_llama, tiny_tokenizer

from prefero.cli import _RUN_COMMANDS, _parser, main
from prefero.config import load_config, parse_overrides, resolve_key
from prefero.recipes.reference import config_markdown
from prefero.recipes.run import find_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "GLOSSARY.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
LANGUAGES = {"python", "bash", "yaml", "json", "text", ""}


def blocks(language: str, pages: list[Path] = PAGES) -> list[Any]:
    """Every fenced block of a language as a test parameter named by its page and line."""
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
            assert match[2] in LANGUAGES, f"{page.name}: a block in {match[2]!r} would be checked by nobody"
            if match[2] == language:
                line = text.count("\n", 0, match.start()) + 1
                found.append(pytest.param(match[3], id=f"{page.name}:{line}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "examples" / "data", tmp_path / "examples" / "data")
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "block", "exec"), {"__name__": "block"})  # noqa: S102 our own documentation


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_blocks_are_configs(text: str, tmp_path: Path) -> None:
    path = tmp_path / "block.yaml"
    path.write_text(text, encoding="utf-8")
    load_config(path)


def commands(script: str) -> list[list[str]]:
    """The `prefero ...` and `... -m prefero ...` calls in a shell script, as lists of arguments."""
    joined = script.replace("\\\n", " ").replace("&&", "\n")
    calls = [shlex.split(line, comments=True) for line in joined.splitlines()]
    starts = [(words, "prefero" in words and words[words.index("prefero") - 1] == "-m") for words in calls]
    return [
        words[words.index("prefero") + 1 :] if module else words[1:]
        for words, module in starts
        if module or (words and Path(words[0]).name == "prefero")
    ]


@pytest.mark.parametrize("script", blocks("bash"))
def test_commands_in_bash_blocks_exist(script: str) -> None:
    assert "prefero" in script or ".venv" in script
    for arguments in commands(script):
        check_command(arguments)


def test_commands_in_running_text_exist() -> None:
    seen = 0
    for page in PAGES:
        for text in re.findall(r"`(?:[^`]*-m )?(prefero [a-z][^`]*)`", page.read_text(encoding="utf-8")):
            if "|" in text or "COMMAND" in text:
                continue
            seen += 1
            arguments = shlex.split(text.replace("[", " ").replace("]", " "))[1:]
            if len(arguments) > 1 or arguments[0] in ("quickstart", "doctor", "config"):
                check_command(arguments)
            else:
                assert arguments[0] in _RUN_COMMANDS or f"'{arguments[0]}'" in str(_parser()._subparsers._actions), text  # type: ignore[union-attr]
    assert seen > 10


def check_command(arguments: list[str]) -> None:
    known, rest = _parser().parse_known_args(arguments)
    assert known.command in (*_RUN_COMMANDS, "resume") or not rest, arguments
    for key, _ in parse_overrides(rest):
        resolve_key(key, section=known.command, flag=True)
    config = getattr(known, "config", "")
    if config.startswith("configs/"):
        load_config(find_config(str(ROOT / config)), rest)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("https://"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_the_list_of_keys_is_the_config_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert printed == config_markdown()
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == printed, "run `prefero config --markdown > docs/configuration.md`"


def test_the_defaults_named_in_the_ppo_page_are_the_defaults() -> None:
    rows = re.findall(
        r"^\| (`[^|]*`) \| ([^|]*) \|", (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    words = {"off": 0, "same": 0, "all": 0, "true": True}
    checked = 0
    config = load_config(None)
    for keys, defaults in rows:
        names = re.findall(r"`([\w.]+)`", keys)
        values = [value.strip() for value in defaults.split(",")]
        if len(names) != len(values):
            continue
        for name, value in zip(names, values, strict=True):
            section, _, key = name.rpartition(".")
            if hasattr(getattr(config, section or "ppo"), key):
                expected = words.get(value, yaml.safe_load(value))
                assert getattr(getattr(config, section or "ppo"), key) == expected, name
                checked += 1
    assert checked >= 15


def test_the_readme_s_own_reward_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """my.yaml and my_rewards.py exactly as printed, on a tiny chat model instead of the hub's."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    config = re.search(r"```yaml\n# my\.yaml\n(.*?)```", text, re.DOTALL)
    rewards = re.search(r"```python\n# my_rewards\.py\n(.*?)```", text, re.DOTALL)
    assert config is not None
    assert rewards is not None
    Path("my.yaml").write_text(config[1])
    Path("my_rewards.py").write_text(rewards[1])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}tell {% endif %}"
    )
    tiny_llama(len(tokenizer)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    words = ("movie", "hotel", "good", "bad", "great", "awful", "it", "me")
    Path("prompts.jsonl").write_text("".join(f'{{"prompt": "how was {a} {b} ?"}}\n' for a in words for b in words))
    flags = ["--model.path", "base", "--ppo.steps", "1", "--max-new-tokens", "4", "--evaluate.num-prompts", "4"]
    assert main(["pipeline", "my.yaml", "--out", "run", *flags]) == 0
    named = re.search(r"leaves the same folder: `([^`]*)`", text)
    assert named is not None
    assert {path.name for path in Path("run").iterdir() if path.name[0] != "."} == set(
        named[1].replace("/", "").split()
    )
    assert "rollout/reward_polite" in Path("run/metrics.jsonl").read_text()
