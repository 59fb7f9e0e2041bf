"""Configuration: strict, explained, and the same from YAML and from the command line."""

from pathlib import Path

import pytest

from prefero.config import Config, ConfigError, describe, load_config, to_dict, walk


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_then_yaml_then_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, "ppo: {kl_coef: 5e-2, steps: 7}\n")
    config = load_config(path, ["--ppo.steps", "9"])
    assert (config.ppo.kl_coef, config.ppo.steps, config.ppo.gamma) == (0.05, 9, 1.0)


@pytest.mark.parametrize("flag", ["--kl-coef", "--kl_coef", "--ppo.kl-coef", "--ppo.kl_coef"])
def test_a_key_may_be_given_by_its_ending_with_dashes_or_underscores(flag: str) -> None:
    assert load_config(None, [flag, "0"]).ppo.kl_coef == 0.0
    assert load_config(None, [f"{flag}=0"]).ppo.kl_coef == 0.0


def test_an_ambiguous_ending_is_refused_outside_a_stage_and_resolved_inside_one() -> None:
    with pytest.raises(ConfigError, match=r"--sft\.steps or --reward\.steps or --ppo\.steps"):
        load_config(None, ["--steps", "5"])
    assert load_config(None, ["--steps", "5"], section="ppo").ppo.steps == 5


def test_named_rewards_can_be_given_on_the_command_line() -> None:
    config = load_config(None, ["--rewards.mine.use", "my.py:f", "--ppo.rewards.mine.weight", "2"])
    assert config.ppo.rewards["mine"].use == "my.py:f"
    assert config.ppo.rewards["mine"].weight == 2.0


@pytest.mark.parametrize("text", ["rule:contains:", "12", "no", "", "a: b"])
def test_a_flag_for_text_takes_it_as_it_is_typed(text: str) -> None:
    assert load_config(None, ["--model.path", text]).model.path == text
    assert load_config(None, [f"--model.path={text}"]).model.path == text


def test_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "sft:\n  learning_rate: 5e-6\n")).sft.learning_rate == 5e-6


@pytest.mark.parametrize(
    ("yaml", "flags", "message"),
    [
        ("ppo: {learning_rat: 1}\n", [], "run.yaml: unknown key ppo.learning_rat; did you mean ppo.learning_rate"),
        ("kl_coef: 1\n", [], "unknown key kl_coef; did you mean ppo.kl_coef"),
        ("", ["--kl-coeff", "1"], "unknown key --kl-coeff; did you mean --kl-coef"),
        ("", ["--zzzzqqq", "1"], "unknown key --zzzzqqq; `prefero config` lists them all"),
        ("ppo: {steps: many}\n", [], "run.yaml.*ppo.steps: 'many' will not do"),
        ("ppo: {steps: 0}\n", [], "ppo.steps: 0 will not do: input should be greater than or equal to 1"),
        (
            "sft: {schedule: polynomial}\n",
            [],
            "sft.schedule: 'polynomial' will not do.*'constant', 'linear' or 'cosine'",
        ),
        ("ppo: [1, 2]\n", [], "ppo"),
        ("- 1\n", [], "expected `key: value` lines, found list"),
        ("ppo: {steps: 3\n", [], "not valid YAML"),
        ("", ["steps", "3"], "unexpected argument 'steps'; overrides are written --key value"),
        ("", ["--train-batch-size", "512"], "an iteration has only 64 completions"),
        ("", ["--kl-target", "4", "--kl-coef", "0"], "needs a starting ppo.kl_coef above 0"),
        ("", ["--dual-clip", "0.5"], "must be above 1"),
        ("", ["--min-new-tokens", "99"], "exceeds ppo.max_new_tokens"),
        ("", ["--reward.skip"], "PPO has no reward"),
        ("", ["--reward.skip", "--rewards.a.use", "trained"], "reward.skip is true"),
        ("", ["--world", "grammar", "--data.sft", "x.jsonl"], "data.sft is 'x.jsonl', .*brings its own rows"),
        ("", ["--world", "movies", "--prompts-heldout", "x.jsonl"], "data.prompts_heldout is 'x.jsonl'"),
        ("", ["--world", "movies", "--max-bad-rows", "3"], "data.max_bad_rows is 3"),
        ("ppo: {rewards: {my-judge: {use: vader}}}\n", [], "'my-judge'; name it with letters, digits and underscores"),
        ("", ["--steps", "--ppo.steps"], "--steps could mean"),
        ("", ["--ppo.steps"], "--ppo.steps needs a value"),
        ("ppo: {steps: true}\n", [], "ppo.steps: True will not do: input should be a number"),
        ("ppo: {rewards: {a: {use: vader, weight: true}}}\n", [], "ppo.rewards.a.weight: True"),
        ("", ["--ppo.learning-rate", "inf"], "ppo.learning_rate.*finite"),
        ("", ["--seed", "4294967296"], "seed: 4294967296"),
        ("", ["--ppo.steps", "3", "--critic-warmup", "3"], "the actor would never learn"),
        ("", ["--reward.loss", "log_exp", "--centering", "0.1"], "needs reward.loss log_sig"),
        ("", ["--rewards.a.use", "vader", "--rewards.a.clamp", "3"], "clamp limits a reward model's score"),
        ("", ["--rewards.a.use", "vader", "--gold", "vader"], "is trained on; an independent scorer"),
        ("", ["--gold", "trained"], "the reward itself"),
        ("", ["--model.tokenizer", "x"], "model.path is empty"),
        ("ppo: {rewards: {a: {uses: x}}}\n", [], "unknown key ppo.rewards.a.uses; did you mean ppo.rewards.a.use"),
    ],
)
def test_a_bad_config_names_key_value_and_cure(tmp_path: Path, yaml: str, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, yaml), flags)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("ppo:\n  steps: 1\nseed: 3\nppo:\n  kl_coef: 0\n")
    with pytest.raises(ConfigError, match=r"(?s)c\.yaml.*'ppo' stands in line 1 already.*line 4"):
        load_config(file)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(path)


def test_a_written_config_reads_back_as_the_same(tmp_path: Path) -> None:
    import yaml

    config = load_config(None, ["--rewards.a.use", "vader", "--seed", "3"])
    path = written(tmp_path, yaml.safe_dump(to_dict(config)))
    assert load_config(path) == config


def test_every_key_has_a_sentence() -> None:
    for path, item in walk(Config):
        assert describe(item)[2].endswith("."), ".".join(path)


def test_configs_that_come_with_the_package_are_valid() -> None:
    configs = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert configs
    for path in configs:
        load_config(path)
