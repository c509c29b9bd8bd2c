"""The command line's words and their environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from ensemble.config import SHIPPED_WEIGHTS, RunConfig
from ensemble.errors import UsageError
from ensemble.options import parse, run_config


def test_without_arguments_it_is_the_contract() -> None:
    options = parse([], {})
    assert options.command is None
    assert (options.input, options.output) == (Path("/input"), Path("/output"))
    assert run_config(options) == RunConfig()


def test_the_command_line_wins_over_the_environment_and_that_over_the_defaults() -> None:
    environment = {"ISLES_TTA": "none", "ISLES_FUSION": "mean", "ISLES_INPUT": "/data", "UNRELATED": "x"}
    options = parse(["--fusion", "staple"], environment)
    assert (options.tta, options.fusion, options.input, options.device) == ("none", "staple", Path("/data"), "auto")


@pytest.mark.parametrize("before", [True, False])
def test_common_options_stand_before_or_after_the_command(before: bool) -> None:
    common, command = ["--members", "a, b"], ["run", "--dwi", "d", "--adc", "a", "--out", "o"]
    options = parse(common + command if before else command + common, {"ISLES_MIN_MEMBERS": "1", "ISLES_REPORT": "1"})
    assert run_config(options).members == ("a", "b")
    assert run_config(options).min_members == 1
    assert (options.dwi, options.flair, options.format) == (Path("d"), None, "nii.gz")


def test_every_option_of_run_can_come_from_the_environment() -> None:
    environment = {"ISLES_DWI": "d", "ISLES_ADC": "a", "ISLES_OUT": "o", "ISLES_SAVE_PROBABILITIES": "yes"}
    options = parse(["run"], environment)
    assert options.out == Path("o")
    assert options.save_probabilities is True
    assert parse(["run", "--no-save-probabilities"], environment).save_probabilities is False


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--fusion", "median"], {}, "invalid choice"),
        (["--no-such-option"], {}, "unrecognized"),
        (["walk"], {}, "invalid choice"),
        (["run", "--dwi", "d"], {}, "--adc, --out"),
        ([], {"ISLES_FUSION": "median"}, "ISLES_FUSION"),
        ([], {"ISLES_MIN_MEMBERS": "two"}, "ISLES_MIN_MEMBERS"),
        ([], {"ISLES_REPORT": "maybe"}, "ISLES_REPORT"),
        ([], {"ISLES_FUSON": "mean"}, "ISLES_FUSON"),
        (
            ["--output", "o", "run", "--dwi", "d", "--adc", "a", "--out", "o"],
            {},
            "--output says nothing to the command run",
        ),
    ],
)
def test_wrong_usage(arguments: list[str], environment: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parse(arguments, environment)
    assert error.value.exit_code == 2


def test_an_empty_variable_is_as_good_as_none() -> None:
    options = parse([], {"ISLES_OUTPUT": "", "ISLES_MIN_MEMBERS": "", "ISLES_REPORT": ""})
    assert (options.output, options.min_members, options.report) == (Path("/output"), None, False)


@pytest.mark.parametrize("wrong", [{"min_members": 0}, {"members": ()}, {"members": ("a", "a")}, {"tta": "some"}])
def test_configurations_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        RunConfig(**wrong)  # type: ignore[arg-type]


def test_an_empty_platform_folder_does_not_hide_the_shipped_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ensemble.config.PLATFORM_WEIGHTS", tmp_path)
    assert RunConfig().weights_folder == SHIPPED_WEIGHTS
    (tmp_path / "manifest.json").touch()
    assert RunConfig().weights_folder == tmp_path
    assert RunConfig(weights=Path("/mine")).weights_folder == Path("/mine")
