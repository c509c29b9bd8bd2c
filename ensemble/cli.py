"""The command line: parse options, run a command, return its exit code. Heavy imports are left to each command."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from ensemble.config import ExtraOutputs, Precision
from ensemble.errors import InputRefused, UsageError, UserError, WeightsBroken
from ensemble.logging_setup import report_failure, set_up_logging, write_final_error_line
from ensemble.memory import as_user_error
from ensemble.options import BIDS_APP, make_run_config, parse_options, to_arguments
from ensemble.program import command_line

if TYPE_CHECKING:
    from ensemble.batch.run import BatchCases
    from ensemble.evaluate.blinded import ReaderStudyRequest

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns one of the exit codes listed by `--help`; a bug prints its traceback and returns 1."""
    set_up_logging()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments)
        logging.getLogger("ensemble").setLevel(logging.DEBUG if options.verbose else logging.INFO)
        commands = {
            None: _contract,
            "run": _run,
            "study": _study,
            "listen": _listen,
            "serve": _serve,
            "members": _members,
            "batch": _batch,
            BIDS_APP: _bids_app,
            "slurm": _slurm,
            "evaluate": _evaluate,
            "inspect": _inspect,
        }
        return commands[options.command](options)
    except UserError as error:
        report_failure(error)
        return error.exit_code
    except KeyboardInterrupt:
        log.error("interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output has closed the pipe
        return 0
    except ModuleNotFoundError as error:
        do = "use the environment that ./run.sh makes: .venv/bin/python"
        report_failure(UserError(f"the Python package {error.name} is not installed", do=do))
        return UserError.exit_code
    except Exception as error:
        report_failure(as_told := as_user_error(error))
        return as_told.exit_code if isinstance(as_told, UserError) else 1
    finally:
        _flush()


def _contract(options: argparse.Namespace) -> int:
    from ensemble.contract.execute import run_case
    from ensemble.contract.isles22 import find_inputs
    from ensemble.folders import exclusive_writer
    from ensemble.hospital.study import mercure_folders
    from ensemble.pipeline import load_from_config
    from ensemble.progress import LogWatcher

    if (folders := mercure_folders(os.environ)) is not None:
        return _mercure(options, *folders)
    config, extras = make_run_config(options, report=options.report), _extras(options, report=options.report)
    found = find_inputs(options.input)
    with exclusive_writer(options.output):
        result = run_case(found, options.output, lambda: load_from_config(config), extras, LogWatcher())
    log.info("lesions: %d, %.3f ml; voted: %s", result.lesion_count, result.lesion_ml, ", ".join(result.fused.voters))
    return 0


def _mercure(options: argparse.Namespace, folder: Path, out: Path) -> int:
    from ensemble.folders import exclusive_writer
    from ensemble.hospital.study import segment_into_objects
    from ensemble.pipeline import load_from_config
    from ensemble.progress import LogWatcher

    config, extras = make_run_config(options), replace(_extras(options, report=False), dicom=True)
    with exclusive_writer(out):
        case = segment_into_objects(folder, "study", out, extras, lambda: load_from_config(config), LogWatcher())
    log.info("lesions: %d, %.3f ml", case.result.lesion_count, case.result.lesion_ml)
    return 0


def _study(options: argparse.Namespace) -> int:
    from ensemble.folders import exclusive_writer
    from ensemble.hospital.study import segment_study
    from ensemble.outputs.closing_lines import closing_lines
    from ensemble.outputs.foreign import refuse_overwriting_foreign_files
    from ensemble.pipeline import load_from_config
    from ensemble.progress import default_watcher

    config, suffix = make_run_config(options, report=True), f".{options.format}"
    extras = replace(_extras(options, report=True), dicom=True)
    with exclusive_writer(options.out):
        refuse_overwriting_foreign_files(options.out, [options.study])
        with closing(default_watcher()) as watching:
            case = segment_study(options.study, options.out, suffix, extras, lambda: load_from_config(config), watching)
    for line in closing_lines(case, extras, options.out, suffix).split("\n"):
        log.info("%s", line)
    return 0


def _run(options: argparse.Namespace) -> int:
    from ensemble.folders import exclusive_writer
    from ensemble.outputs.artifacts import SegmentedCase
    from ensemble.outputs.closing_lines import closing_lines
    from ensemble.outputs.dicom.study import require_one_study
    from ensemble.outputs.foreign import refuse_overwriting_foreign_files
    from ensemble.outputs.layouts.folder import publish_run_outputs
    from ensemble.pipeline import load_from_config, segment_raw
    from ensemble.progress import default_watcher
    from ensemble.publish import check_writable
    from ensemble.readers.imagefile import case_name, read_case_files
    from ensemble.types import Modality

    config, extras, suffix = make_run_config(options, report=True), _extras(options, report=True), f".{options.format}"
    given = {Modality.DWI: options.dwi, Modality.ADC: options.adc, Modality.FLAIR: options.flair}
    raw = read_case_files(
        case_name(options.dwi), {modality: path for modality, path in given.items() if path is not None}
    )
    require_one_study(raw, extras)
    with exclusive_writer(options.out):
        refuse_overwriting_foreign_files(options.out, [image.path for image in raw.images.values()])
        check_writable(options.out)
        ensemble = load_from_config(config)
        with closing(default_watcher()) as watching:
            result = segment_raw(raw, ensemble, watching, shows_images=extras.show_images)
        case = SegmentedCase.of(raw, result, ensemble, extras)
        publish_run_outputs(case, extras, options.out, suffix)
    for line in closing_lines(case, extras, options.out, suffix).split("\n"):
        log.info("%s", line)
    return 0


def _serve(options: argparse.Namespace) -> int:
    from ensemble.progress import LogWatcher
    from ensemble.serve.serve import ServerConfig, serve
    from ensemble.serve.worker import WorkerConfig

    level = logging.DEBUG if options.verbose else logging.INFO
    config, extras = make_run_config(options, report=options.report), _extras(options, report=options.report)
    worker_config = WorkerConfig(config, extras, LogWatcher(), level)
    return serve(
        worker_config, ServerConfig(options.input, options.output, options.host, options.port, options.longest_wait)
    )


def _listen(options: argparse.Namespace) -> int:
    from ensemble.hospital.listen import ListenConfig, listen
    from ensemble.hospital.node import NodeConfig
    from ensemble.hospital.segmentation_process import segment_job
    from ensemble.hospital.send import parse_destinations
    from ensemble.progress import SilentWatcher
    from ensemble.serve.worker import WorkerConfig

    level = logging.DEBUG if options.verbose else logging.INFO
    extras = replace(_extras(options, report=False), dicom=True)
    told = ListenConfig(
        NodeConfig(options.aet, options.host, options.port, options.allow or (), options.most_associations),
        parse_destinations(options.send_to),
        options.spool,
        int(options.spool_gb * 1e9),
        options.quiet_seconds,
        options.keep_hours * 3600,
        options.status_port,
    )
    listen(told, WorkerConfig(make_run_config(options), extras, SilentWatcher(), level, segment_job))
    return 0


def _members(options: argparse.Namespace) -> int:
    from ensemble.outputs.report.members import check_members, compare_members, log_members

    config, paths = make_run_config(options), options.paths
    wanted, what, usage = {
        "pack": (2, "a source and a destination", "members pack SRC DST"),
        "fit-reference": (1, "a dataset", "members fit-reference DATASET"),
        "diagnose": (0, "no folders", "members diagnose --dataset DATASET"),
    }.get(options.action, (0, "no folders", f"members {options.action}"))
    if len(paths) != wanted:
        raise UsageError(
            f"members {options.action} takes {what}",
            found=" ".join(map(str, paths)),
            do=f"use: {command_line(usage)}; name the weights folder with --weights DIR",
        )
    if options.compare is not None and options.action != "check":
        raise UsageError(
            f"--compare has no effect on members {options.action}", do="use it with: members check --compare FOLDER"
        )
    if options.action == "diagnose":
        return _diagnose(options)
    if asked := [word for word in ("dataset", "simulated", "out") if getattr(options, word) is not None]:
        raise UsageError(f"--{asked[0]} has no effect on members {options.action}", do="use it with: members diagnose")
    if options.action == "pack":
        from ensemble.members.pack import pack_members

        source, destination = paths
        precision = _packed_precision(config.precision)
        for folder in pack_members(source, destination, precision, config.members, onnx=options.onnx):
            log.info("packed: %s", folder)
        return 0
    if options.action == "fit-reference":
        from ensemble.batch.reference import fit_reference

        fit_reference(paths[0], config)
        return 0
    specs = log_members(config)
    if options.action == "check" and not check_members(config, specs):
        return WeightsBroken.exit_code
    if options.compare is not None:
        from ensemble.batch.find import find_only_case

        compare_members(config, specs, *find_only_case(options.compare))
    return 0


def _diagnose(options: argparse.Namespace) -> int:
    from ensemble.batch.diagnose import diagnose_dataset, diagnose_simulated
    from ensemble.folders import exclusive_writer

    if (options.dataset is None) == (options.simulated is None):
        raise UsageError(
            "members diagnose needs exactly one of --dataset and --simulated",
            found="neither" if options.dataset is None else "both",
            do=f"{command_line('members diagnose --dataset DATASET')};"
            " or, in a clone of the repository only: members diagnose --simulated N",
        )
    config, out = make_run_config(options), options.out or Path("diagnosis")
    with exclusive_writer(out):
        if options.dataset is not None:
            diagnose_dataset(options.dataset, out, config)
        else:
            diagnose_simulated(options.simulated, out, config)
    return 0


def _batch(options: argparse.Namespace) -> int:
    from ensemble.batch.run import BatchCases
    from ensemble.batch.selection import CaseSelection

    return _work_on(
        BatchCases(options.dataset, CaseSelection(shard=options.shard), case_list=options.case_list),
        options,
        summarise=options.shard is None,
    )


def _bids_app(options: argparse.Namespace) -> int:
    from ensemble.batch.bids_app import check_bids_dataset, use_work_folder
    from ensemble.batch.bids_filter import read_filter
    from ensemble.batch.run import BatchCases, write_group_summary
    from ensemble.batch.selection import CaseSelection
    from ensemble.folders import exclusive_writer

    labels = tuple(options.participant_label or ()), tuple(options.session_label or ())
    dataset = BatchCases(options.dataset, CaseSelection(*labels, options.shard), case_list=options.case_list)
    if options.bids_filter_file is not None:
        if options.case_list is not None:
            raise UsageError(
                "--bids-filter-file has no effect with --case-list, since the images of that list are already chosen",
                do="remove one of --bids-filter-file and --case-list",
            )
        if options.dataset.is_file():
            raise UsageError(
                "--bids-filter-file has no effect on a worklist",
                do="leave out --bids-filter-file and delete rows from the worklist, or give the dataset folder",
            )
        dataset = replace(dataset, wanted=read_filter(options.bids_filter_file))
    if options.level == "group":
        if options.dry_run:
            raise UsageError(
                "--dry-run has no effect on the level group", do="remove it, or use it with the level participant"
            )
        with exclusive_writer(options.out, shared=True):
            return write_group_summary(dataset, options.out, parquet=options.parquet)
    if not options.skip_bids_validation:
        check_bids_dataset(options.dataset)
    if options.work_dir is not None:
        use_work_folder(options.work_dir)
    return _work_on(dataset, options, summarise=False)


def _work_on(dataset: BatchCases, options: argparse.Namespace, *, summarise: bool) -> int:
    from ensemble.batch.run import segment_dataset
    from ensemble.folders import exclusive_writer

    extras = _extras(options, report=options.report, in_report=True)
    if options.dry_run:
        from ensemble.batch.estimate import dry_run

        config = make_run_config(options, report=True)
        return dry_run(dataset, options.out, config, extras, resume=options.resume, as_json=options.json)
    if options.json:
        raise UsageError("--json has no effect without --dry-run", do="remove it, or add --dry-run")
    with exclusive_writer(options.out, shared=True):
        return segment_dataset(
            dataset,
            options.out,
            make_run_config(options, report=True),
            extras,
            resume=options.resume,
            summarise=summarise,
            parquet=options.parquet,
            ray=options.ray,
            ray_cpus=options.ray_cpus,
        )


def _slurm(options: argparse.Namespace) -> int:
    from ensemble.batch.run import BatchCases
    from ensemble.batch.slurm import SlurmResources, write_scripts

    extras = _extras(options, report=options.report, in_report=True)
    own = {field.name: getattr(options, field.name) for field in fields(SlurmResources)}
    words = to_arguments(options, set(vars(options)) - {*own, "scripts"})
    dataset = BatchCases(options.dataset)
    write_scripts(
        dataset,
        options.out,
        make_run_config(options, report=True),
        extras,
        words,
        SlurmResources(**own),
        options.scripts,
    )
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from ensemble.evaluate.run import evaluate
    from ensemble.evaluate.study import StudyRequest

    if options.reader_answers:
        return _score_answers(options)
    if len(options.masks) < 2:
        raise UsageError(
            "evaluate needs at least two paths: predicted masks first, true masks last",
            found=" ".join(map(str, options.masks)) or "no path",
            do=command_line("evaluate PREDICTIONS [PREDICTIONS ...] GROUND_TRUTH --out metrics.csv"),
        )
    *predictions, truths = options.masks
    asked = StudyRequest(options.clinical, options.by or (), _asked_readers(options))
    return InputRefused.exit_code if evaluate(predictions, truths, options.out, asked) else 0


def _asked_readers(options: argparse.Namespace) -> ReaderStudyRequest | None:
    from ensemble.batch.find import find_cases
    from ensemble.evaluate.blinded import DatasetImages, ReaderStudyRequest

    page: Path | None = options.reader_study
    if page is None:
        if options.images or options.key:
            raise UsageError(
                "--images and --key have no effect without --reader-study or --reader-answers",
                do="remove them, or add one of the two options",
            )
        return None
    if options.images is None:
        raise UsageError(
            "--reader-study needs the images of the cases", do="add --images DATASET (any dataset that batch accepts)"
        )
    files = {case.name: case.files for case in find_cases(options.images, page)}
    root = options.images if options.images.is_dir() else options.images.parent
    return ReaderStudyRequest(page, options.key or page.with_name(f"{page.stem}_key.json"), DatasetImages(root, files))


def _score_answers(options: argparse.Namespace) -> int:
    from ensemble.evaluate.answers import score_answers

    others = {"paths of masks": options.masks, "--clinical": options.clinical, "--by": options.by}
    others |= {"--reader-study": options.reader_study, "--images": options.images}
    if found := [name for name, value in others.items() if value]:
        raise UsageError(
            "--reader-answers can only be combined with --key and --out", found=", ".join(found), do="remove the others"
        )
    if options.key is None:
        raise UsageError(
            "--reader-answers needs --key",
            do="add --key with the .json file that was written together with the reader-study page (.html)",
        )
    score_answers(options.reader_answers, options.key, options.out)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    import json

    from ensemble.outputs.report.inspect import as_json, as_lines, check_destination, inspection_error, save_volume
    from ensemble.readers.base import RawImage
    from ensemble.readers.inspect import inspect_path
    from ensemble.text import replace_undecodable_in_json
    from ensemble.types import Modality

    asked = Modality(word) if (word := getattr(options, "as")) else None
    if options.write is not None and asked is None:
        raise UsageError(
            "--write needs --as, which says which image to write", do="add --as dwi, --as adc or --as flair"
        )
    if options.write is not None:
        check_destination(options.write, options.path)
    finding = inspect_path(options.path, asked)
    image = finding.images.get(asked) if asked else None
    written = options.write if isinstance(image, RawImage) else None
    if written is not None and isinstance(image, RawImage):
        save_volume(image.volume, written)  # before a word: JSON stands alone, or an error does
    as_text = json.dumps(replace_undecodable_in_json(as_json(finding)), indent=2).split("\n")
    lines = as_text if options.json else as_lines(finding)
    for line in lines:
        log.info("%s", line)
    if written is not None and not options.json:
        log.info("written: %s", written)
    if refused := inspection_error(finding, asked):
        write_final_error_line(f"error: {refused}")
        return InputRefused.exit_code
    return 0


def _packed_precision(choice: Precision) -> Literal["fp32", "fp16"]:
    if choice == "bf16":
        raise UsageError(
            "weights can only be packed as fp32 or fp16", found="--precision bf16", do="use --precision fp32 or fp16"
        )
    return "fp16" if choice == "fp16" else "fp32"


def _extras(options: argparse.Namespace, *, report: bool, in_report: bool | None = None) -> ExtraOutputs:
    """Return which outputs to write.

    Findings and trust stand in a report: they bring one where there would be none, unless one is written anyway (`in_report`), and are off
    if there is none and nobody asks for them.
    """
    asks = [name for name, asked in (("--atlas", options.atlas), ("--save-mni", options.save_mni)) if asked]
    if options.findings == "off" and asks:
        raise UsageError(f"{asks[0]} needs the findings", found="--findings off", do="remove one of the two options")
    wanted = bool(asks) or (report if in_report is None else in_report)
    findings = options.findings == "on" or (options.findings is None and wanted)
    if options.atlas is not None:
        from ensemble.findings.maps import read_label_maps

        read_label_maps(options.atlas)  # unusable options are reported before networks are loaded
    return ExtraOutputs(
        report or ((findings or options.trust == "on") and in_report is None),
        options.save_probabilities,
        options.save_member_masks,
        findings,
        options.atlas,
        options.save_mni,
        options.dicom or options.dicom_probability,
        options.dicom_probability,
    )


def _flush() -> None:
    """Flush stdout; a closed pipe or a full disk must not cause a traceback at exit."""
    if sys.stdout is None:  # started with it closed
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(signum: int, frame: FrameType | None) -> None:
    """Raise an exception on SIGTERM, so that partial outputs are removed."""
    raise SystemExit(128 + signum)
