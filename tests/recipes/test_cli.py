"""The command line: fast help, exit codes, and errors a user can act on."""

import subprocess
import sys
from pathlib import Path

import pytest

from prefero import __version__
from prefero.cli import main

COMMANDS = [
    "quickstart", "pipeline", "sft", "reward", "ppo", "ilql", "generate",
    "evaluate", "chat", "report", "fetch", "doctor", "config", "dpo", "kto", "orpo", "simpo", "cpo",
]  # fmt: skip


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom prefero.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as done:\n    assert done.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert command in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


def test_config_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    assert "ppo.kl_coef: float = 0.05" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pipeline", "nowhere.yaml"], "no config file nowhere.yaml (CONFIG comes first"),
        (["pipeline", "nowhere.yaml"], "configs/quickstart.yaml"),
        (["quickstart", "--kl-coeff", "0"], "did you mean --kl-coef"),
        (["ppo", "configs/quickstart.yaml"], "model.path is empty"),
        (["reward", "configs/quickstart.yaml"], "model.path"),
        (["generate", "no/such/model", "--prompt", "x"], "no/such/model"),
        (["chat", "no/such/model"], "no/such/model"),
        (["report", "no/such/run"], "there is no run folder"),
        (["fetch", "smolm2"], "did you mean 'smollm2'"),
        (["evaluate", "no/such/model"], "give --config FILE"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("prefero: error: ")
    assert message in error


def test_an_unknown_flag_of_a_plain_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["generate", "x", "--tmperature", "1"])
    assert done.value.code == 2
    assert "--tmperature" in capsys.readouterr().err
