"""The command line's words and their environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from ensemble.config import SHIPPED_WEIGHTS, RunConfig
from ensemble.errors import UsageError
from ensemble.options import make_run_config, parse_options


def test_without_arguments_it_is_the_contract() -> None:
    options = parse_options([], {})
    assert options.command is None
    assert (options.input, options.output) == (Path("/input"), Path("/output"))
    assert make_run_config(options) == RunConfig()


def test_the_command_line_wins_over_the_environment_and_that_over_the_defaults() -> None:
    environment = {"ISLES_TTA": "none", "ISLES_FUSION": "mean", "ISLES_INPUT": "/data", "UNRELATED": "x"}
    options = parse_options(["--fusion", "staple"], environment)
    assert (options.tta, options.fusion, options.input, options.device) == ("none", "staple", Path("/data"), "auto")


@pytest.mark.parametrize("before", [True, False])
def test_common_options_stand_before_or_after_the_command(before: bool) -> None:
    common, command = ["--members", "a, b"], ["run", "--dwi", "d", "--adc", "a", "--out", "o"]
    options = parse_options(
        common + command if before else command + common, {"ISLES_MIN_MEMBERS": "1", "ISLES_REPORT": "1"}
    )
    assert make_run_config(options).members == ("a", "b")
    assert make_run_config(options).min_members == 1
    assert (options.dwi, options.flair, options.format) == (Path("d"), None, "nii.gz")


def test_every_option_of_run_can_come_from_the_environment() -> None:
    environment = {"ISLES_DWI": "d", "ISLES_ADC": "a", "ISLES_OUT": "o", "ISLES_SAVE_PROBABILITIES": "yes"}
    options = parse_options(["run"], environment)
    assert options.out == Path("o")
    assert options.save_probabilities is True
    assert parse_options(["run", "--no-save-probabilities"], environment).save_probabilities is False


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--fusion", "median"], {}, "invalid choice"),
        (["--no-such-option"], {}, "unrecognized"),
        (["walk"], {}, "invalid choice"),
        (["run", "--adc", "a"], {}, "--dwi, --out"),
        (["--member-weights", "a"], {}, "NAME=NUMBER"),
        (["--member-weights", "a=1,a=2"], {}, "twice"),
        ([], {"ISLES_MIN_MEMBERS": "two"}, "'two': not a whole number"),
        ([], {"ISLES_MEMBER_WEIGHTS": "a=b"}, "NAME=NUMBER"),
        ([], {"ISLES_FUSION": "median"}, "ISLES_FUSION"),
        ([], {"ISLES_MIN_MEMBERS": "two"}, "ISLES_MIN_MEMBERS"),
        ([], {"ISLES_REPORT": "maybe"}, "ISLES_REPORT"),
        ([], {"ISLES_FUSON": "mean"}, "ISLES_FUSON"),
        (
            ["--output", "o", "run", "--dwi", "d", "--adc", "a", "--out", "o"],
            {},
            "--output has no effect on the command run",
        ),
    ],
)
def test_wrong_usage(arguments: list[str], environment: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parse_options(arguments, environment)
    assert error.value.exit_code == 2


def test_an_empty_variable_is_as_good_as_none() -> None:
    options = parse_options([], {"ISLES_OUTPUT": "", "ISLES_MIN_MEMBERS": "", "ISLES_REPORT": ""})
    assert (options.output, options.min_members, options.report) == (Path("/output"), None, False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_members": 0},
        {"members": ()},
        {"members": ("a", "a")},
        {"tta": "some"},
        {"member_weights": {"a": 0.0}},
        {"min_lesion_ml": -1.0},
    ],
)
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


@pytest.mark.parametrize("service", ["ISLES", "ISLES_ENSEMBLE", "ISLES_MIN", "ISLES_PORT"])
def test_what_kubernetes_says_of_a_service_of_our_name_is_ignored(
    service: str, caplog: pytest.LogCaptureFixture
) -> None:
    links = {
        f"{service}_SERVICE_HOST": "10.0.0.7",
        f"{service}_SERVICE_PORT": "4743",
        f"{service}_SERVICE_PORT_HTTP": "4743",
        f"{service}_PORT": "tcp://10.0.0.7:4743",
        f"{service}_PORT_4743_TCP": "tcp://10.0.0.7:4743",
        f"{service}_PORT_4743_TCP_PROTO": "tcp",
        f"{service}_PORT_4743_TCP_PORT": "4743",
        f"{service}_PORT_4743_TCP_ADDR": "10.0.0.7",
    }
    with caplog.at_level("INFO", "ensemble"):
        options = parse_options(["serve"], links | {"ISLES_TTA": "none"})
    assert (options.port, options.tta) == (4743, "none")
    (note,) = [record.message for record in caplog.records]
    assert f"{service}_SERVICE_HOST" in note


def test_a_port_that_the_user_sets_counts_beside_a_service() -> None:
    environment = {"ISLES_SERVICE_HOST": "10.0.0.7", "ISLES_SERVICE_PORT": "80", "ISLES_PORT": "5000"}
    assert parse_options(["serve"], environment).port == 5000


@pytest.mark.parametrize(
    "name", ["ISLES_SERVICE_PORT", "ISLES_POTR", "ISLES_PORT_80_TCP", "ISLES_MIN_MEMBER", "ISLES_ENSEMBLE_PORTS"]
)
def test_a_mistyped_option_is_still_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        parse_options([], {name: "1"})


@pytest.mark.parametrize(
    "files",
    [
        ["README.md"],
        ["a_tarball_subdirectory/some_tarball_resource.txt"],
        [".gitkeep", ".hidden/weights.pth", "lost+found/#1234"],
        ["LICENSE", "notes.rst", "docs/picture.png"],
        [],
    ],
)
def test_what_is_no_weights_does_not_count_in_the_platforms_folder(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    monkeypatch.setattr("ensemble.config.PLATFORM_WEIGHTS", tmp_path)
    config = RunConfig()
    assert config.weights_folder == SHIPPED_WEIGHTS
    seen = [name for name in files if not name.startswith(".")]
    assert bool(config.platform_note) == bool(seen)
    assert all(Path(name).parts[0] in config.platform_note for name in seen)
    assert not RunConfig(weights=tmp_path).platform_note


@pytest.mark.parametrize("name", ["model.pth", "deep/er/plans.json", "weights.zip", "model", "best.ckpt"])
def test_what_may_be_weights_counts_in_the_platforms_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x")
    monkeypatch.setattr("ensemble.config.PLATFORM_WEIGHTS", tmp_path)
    assert (RunConfig().weights_folder, RunConfig().platform_note) == (tmp_path, "")


def test_the_former_name_of_an_option_is_still_understood() -> None:
    def chosen(*arguments: str, **environment: str) -> float | None:
        return make_run_config(
            parse_options(["run", "--dwi", "d", "--out", "o", *arguments], environment)
        ).min_disputed_ml

    assert chosen("--speck-ml", "0.3") == chosen("--min-disputed-ml", "0.3") == 0.3
    assert chosen(ISLES_SPECK_ML="0.4") == chosen(ISLES_MIN_DISPUTED_ML="0.4") == 0.4
    assert chosen(ISLES_SPECK_ML="0.4", ISLES_MIN_DISPUTED_ML="0.5") == 0.5
    assert chosen("--speck-ml", "0.3", ISLES_MIN_DISPUTED_ML="0.5") == 0.3
    with pytest.raises(UsageError, match="ISLES_SPECK_ML"):
        chosen(ISLES_SPECK_ML="little")
