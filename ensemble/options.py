"""The options of the command line, each also an environment variable `ISLES_<OPTION>`. Imports nothing heavy: `--help` answers at once."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args

from ensemble import __version__
from ensemble.config import Device, FusionMethod, Precision, Registration, RunConfig, SessionKind, SkullStrip, Tta
from ensemble.errors import UsageError
from ensemble.families.spec import MIN_DISPUTED_ML
from ensemble.program import help_advice, program_name

log = logging.getLogger(__name__)

ENVIRONMENT_PREFIX = "ISLES_"
#: Names of the variables that Kubernetes sets for a Service (see `kubernetes_service_variables`).
_SERVICE_HOST = re.compile(r"(?P<service>ISLES(_[A-Z0-9_]+)?)_SERVICE_HOST")
_SERVICE_PORT = re.compile(r"(?P<service>ISLES(_[A-Z0-9_]+)?)_PORT")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)
_SERVICE_VARIABLE = re.compile(
    r"_SERVICE_HOST|_SERVICE_PORT(_[A-Z0-9_]+)?|_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?"
)
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}

#: How a BIDS App is called: `BIDS_DIR OUT_DIR LEVEL`.
LEVELS = ("participant", "group")
#: The internal command name of such a call.
BIDS_APP = "bids-app"

_EPILOG = """\
Without a command, %(prog)s honours the ISLES'22 contract of grand-challenge.org: the case below --input is segmented
and the mask and results.json appear below --output. Every option is also read from the environment: --min-members from
ISLES_MIN_MEMBERS, and so on. The command line wins.

As a BIDS App: %(prog)s BIDS_DIR OUT_DIR participant|group (--help behind it lists its options).

exit codes: 0 done; 2 wrong usage, or the output folder can't be written or is in use; 3 input refused; 4 weights missing or
broken; 5 too few members voted; 137 out of memory; 1 a bug.
On any other code than 0 the output folder is left as it was (batch: what was done stays, each case whole or absent).

For research only. Not a medical device."""


class _Parser(argparse.ArgumentParser):
    """Raises usage errors as UsageError, so that they look and exit like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, do=help_advice(self.prog))


def parse_options(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> argparse.Namespace:
    """Return the options of a call: defaults, overridden by the environment, then by the command line. Raises UsageError."""
    parser, commands = _build()
    links = kubernetes_service_variables(environment)
    if links:
        log.info("note: these variables, which Kubernetes sets for a Service, are ignored: %s", ", ".join(links))
    environment = {name: text for name, text in environment.items() if name not in links}
    _refuse_unknown(environment, (parser, *commands.values()))
    stated, left = parser.parse_known_args(normalise_bids_app_call(arguments, commands))
    if left and (not hasattr(stated, "masks") or any(one.startswith("-") for one in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    elif left:  # paths after an option: argparse accepts positional paths only in one piece
        stated.masks = [*stated.masks, *map(Path, left)]
    chosen = commands.get(getattr(stated, "command", None) or "", parser)
    if misplaced := sorted(set(vars(stated)) - {action.dest for action in chosen._actions} - {"command"}):
        names = ", ".join("--" + name.replace("_", "-") for name in misplaced)
        raise UsageError(f"{names} has no effect on the command {stated.command}", do=help_advice(chosen.prog))
    options = _defaults(chosen) | _from_environment(chosen, environment) | vars(stated)
    options.setdefault("command", None)
    if missing := [
        action for action in chosen._actions if getattr(action, "needed", False) and options[action.dest] is None
    ]:
        raise UsageError(
            f"{', '.join(action.option_strings[0] for action in missing)} is needed", do=help_advice(chosen.prog)
        )
    return argparse.Namespace(**options)


def make_run_config(options: argparse.Namespace, *, report: bool = False) -> RunConfig:
    """Return the options that say how cases are segmented; `trust` is off unless a `report` is written."""
    chosen = {field.name: getattr(options, field.name) for field in fields(RunConfig)}
    return RunConfig(**chosen | {"trust": options.trust == "on" or (options.trust is None and report)})


def command_parser(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command."""
    return _build()[1][command]


def _build() -> tuple[_Parser, dict[str, _Parser]]:
    common = _common()
    root = _Parser(
        prog=program_name(),
        description="Segment ischemic stroke lesions in DWI, ADC and FLAIR.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
        argument_default=argparse.SUPPRESS,
    )
    root.add_argument("--version", action="version", version=__version__)
    _add_contract(root.add_argument_group("contract (no command)"))
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=False)
    run = _command(
        commands,
        common,
        "run",
        "segment one case given as files",
        "Segment one case. Writes the mask, report.html, report.json and overlay.png.",
    )
    _add(
        run,
        "--dwi",
        type=Path,
        needed=True,
        metavar="FILE",
        help="diffusion-weighted image (b about 1000 s/mm^2). Each image is a file, or a folder or .zip of DICOM",
    )
    _add(
        run,
        "--adc",
        type=Path,
        metavar="FILE",
        help="map of the apparent diffusion coefficient (ADC), in any usual unit. If it is missing, it is computed from a"
        " DWI that contains b0 and"
        " b about 1000 with their b-values (.bval, or DICOM)",
    )
    _add(run, "--flair", type=Path, metavar="FILE", help="FLAIR image. Without it, members that need it don't vote")
    _add(run, "--out", type=Path, needed=True, metavar="DIR", help="folder for the results")
    _add_format(run)
    study = _command(
        commands,
        common,
        "study",
        "segment one examination, as a scanner or archive sends it",
        "Choose DWI, ADC and FLAIR among the series of one examination and segment it. Writes the outputs of run, the DICOM objects of"
        " --dicom, and in report.json the reasons for the choice of series. Without a command, if MERCURE_IN_DIR and MERCURE_OUT_DIR are"
        " set (as by the mercure orchestrator), the program segments the one folder and writes only DICOM objects into the other.",
    )
    study.add_argument(
        "study", type=Path, metavar="FOLDER_OR_ZIP", help="DICOM files of one examination; other series are ignored"
    )
    study.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    _add_format(study)
    serve = _command(
        commands,
        common,
        "serve",
        "keep the networks in memory and segment one case per POST /invoke",
        "Answer GET /health with 200 once the members are loaded. At POST /invoke, segment the case in --input and answer with 201"
        " when its outputs are in --output. Both folders hold one case at a time. There is no authentication: protect the port.",
    )
    _add_contract(serve.add_argument_group("contract"))
    _add(serve, "--host", default="0.0.0.0", metavar="ADDRESS", help="address to listen on (default: all)")
    _add(serve, "--port", type=int, default=4743, metavar="N", help="port to listen on (default: 4743)")
    _add(
        serve,
        "--longest-wait",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="longest time that a request waits for earlier cases (default: 600)",
    )
    members = _command(
        commands,
        common,
        "members",
        "list, check, pack or diagnose the members that a weights folder holds, or tell them what is usual",
        "list: what was found. check: load each member and verify its files; with --compare, also run nnU-Net's own predictor."
        " pack SRC DST: write a member folder,"
        " or each member of a weights folder, as safetensors and JSON, which load without pickles."
        " fit-reference DATASET: segment a dataset of your own, 20 cases or more, so that the trust score takes your scanner's images"
        " for usual; writes <weights>/trust."
        " diagnose: report stable modes, eigengap and class separability of each encoder stage on the cases of --dataset, or on"
        " --simulated patients; writes a table, JSON and pictures.",
    )
    members.add_argument("action", choices=("list", "check", "pack", "fit-reference", "diagnose"))
    members.add_argument(
        "paths", nargs="*", type=Path, default=[], metavar="PATH", help="pack: SRC DST; fit-reference: DATASET"
    )
    _add(
        members,
        "--compare",
        type=Path,
        metavar="FOLDER",
        help="check: segment this case (<FOLDER>/images/dwi-brain-mri/... or <FOLDER>/dwi.*, adc.*) by each nnU-Net v2 member and by"
        " nnunetv2 itself, which must be installed; prints Dice of the masks and the largest difference of probabilities",
    )
    _add(
        members,
        "--onnx",
        flag=True,
        help="pack: also write each network as ONNX, for --session onnx; refused if its masks differ from PyTorch's",
    )
    _add(
        members,
        "--dataset",
        type=Path,
        metavar="DATASET",
        help="diagnose: your own cases, 10 or more, laid out as for batch; lesions are those that the members find",
    )
    _add(
        members,
        "--simulated",
        type=int,
        metavar="N",
        help="diagnose: number of simulated patients, whose lesions are known; needs training/ and its material",
    )
    _add(members, "--out", type=Path, metavar="DIR", help="diagnose: folder for the results (default: diagnosis)")
    batch = _command(
        commands,
        common,
        "batch",
        "segment every case of a dataset",
        "Segment every case of a BIDS tree, of a folder with <case>/{dwi,adc,flair}.* or <case>/images/dwi-brain-mri/...,"
        " of nnU-Net's <case>_0000.* with dataset.json, or of a .csv with the columns case, dwi, adc, flair (a DWI that contains"
        " b0 with its b-values needs no ADC). Writes BIDS derivatives, summary.csv and index.html. A case that fails is recorded, and"
        " the others go on; the exit code is then the worst one of the failed cases. Complete results survive any interruption, and a"
        " further call processes the remaining cases. Several calls may share one output folder.",
    )
    batch.add_argument("dataset", type=Path, metavar="DATASET", help="folder, or .csv worklist")
    batch.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    _add_batch(batch)
    _add_bids_app(commands, common)
    _add_slurm(commands, common)
    _add_evaluate(commands)
    _add_listen(commands, common)
    _add_inspect(commands)
    return root, commands.choices


def _add_results(group: Any) -> None:
    """Add the options of every command that works on a dataset."""
    _add(
        group,
        "--resume",
        flag=True,
        default=True,
        help="keep results made from the same inputs, weights and options (default); --no-resume recomputes all",
    )
    _add(group, "--report", flag=True, help="also write report.html and overlay.png of each case")
    _add(
        group, "--parquet", flag=True, help="also write summary.parquet, whose columns have types (pip install pyarrow)"
    )


def _add_batch(parser: Any) -> None:
    """Add the options that `batch` and the BIDS App share."""
    group = parser.add_argument_group("how a dataset is processed")
    _add_results(group)
    _add(
        group,
        "--shard",
        type=_shard,
        metavar="I/N",
        help="process only the I-th of N shards of the cases, I from 1 to N. The shard of a case depends only on its name,"
        " so added cases do not"
        " move others. Writes no summary: run DATASET OUT group when all shards are done",
    )
    _add(
        group,
        "--case-list",
        type=Path,
        metavar="FILE",
        help="take the cases that slurm found in DATASET and wrote to FILE, instead of searching again; cases that joined since are not"
        " in it",
    )
    _add(
        group,
        "--ray",
        nargs="?",
        const="local",
        type=_address,
        metavar="ADDRESS",
        help="process the cases on a Ray cluster: HOST:PORT, or auto on one of its machines. Without ADDRESS, use this"
        " machine, with one process"
        " per GPU or per --ray-cpus CPUs. Used by default if there are several GPUs. Needs Ray (pip install ray);"
        " without it, one device is used",
    )
    _add(group, "--ray-cpus", type=_count, default=4, metavar="N", help="CPUs of each Ray process (default: 4)")
    _add_dry_run(group)


def _add_dry_run(group: Any) -> None:
    _add(
        group,
        "--dry-run",
        flag=True,
        help="write nothing; list the cases, those that would be refused by their names or headers, and the expected time and memory;"
        " exit code 3 if a case would be refused",
    )
    _add(group, "--json", flag=True, help="with --dry-run: print JSON")


def _add_bids_app(commands: Any, common: _Parser) -> None:
    app = commands.add_parser(  # without help: it is found by its level, and not listed as a command
        BIDS_APP,
        prog=program_name(),
        parents=[common],
        argument_default=argparse.SUPPRESS,
        description="Run as a BIDS App. participant: segment the cases of all or some participants of a BIDS dataset into BIDS derivatives."
        " group: write summary.csv and index.html for all results of participant.",
    )
    app.add_argument("dataset", type=Path, metavar="BIDS_DIR", help="BIDS dataset")
    app.add_argument("out", type=Path, metavar="OUT_DIR", help="folder for the results")
    app.add_argument("level", choices=LEVELS, help="participant: segment; group: write the summary")
    group = app.add_argument_group("BIDS App")
    _add(
        group,
        "--participant-label",
        former="--participant_label",
        nargs="+",
        metavar="LABEL",
        help="only these participants, with or without sub- (default: all)",
    )
    _add(
        group,
        "--session-label",
        former="--session_label",
        nargs="+",
        metavar="LABEL",
        help="only these sessions, with or without ses- (default: all)",
    )
    _add(
        group,
        "--bids-filter-file",
        former="--bids_filter_file",
        type=Path,
        metavar="FILE",
        help='images to use, selected by BIDS entities: {"dwi": {"acquisition": "b1000"}, "adc": {...}, "flair": {...}}',
    )
    _add(
        group,
        "--work-dir",
        former="--work_dir",
        type=Path,
        metavar="DIR",
        help="folder for temporary files (default: $TMPDIR, else /tmp); unfinished results are kept in OUT_DIR",
    )
    _add(
        group,
        "--skip-bids-validation",
        former="--skip_bids_validation",
        flag=True,
        help="also accept a folder whose dataset_description.json is missing or not that of a raw BIDS dataset",
    )
    _add_batch(app)


def _add_slurm(commands: Any, common: _Parser) -> None:
    slurm = _command(
        commands,
        common,
        "slurm",
        "write a batch as SLURM jobs: a job array that shares the cases, and a summary job",
        "Search DATASET once, and write the list of its cases, participant.sbatch (a job array with one shard of the cases per task),"
        " group.sbatch (the summary) and submit.sh, which submits both. Call it again when cases join DATASET. The options of batch are"
        " passed on. Every path must be the same on all nodes.",
    )
    slurm.add_argument("dataset", type=Path, metavar="DATASET", help="folder, or .csv worklist")
    slurm.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    _add_results(slurm.add_argument_group("how a dataset is processed"))
    group = slurm.add_argument_group("jobs")
    _add(
        group,
        "--scripts",
        type=Path,
        default=Path("isles-slurm"),
        metavar="DIR",
        help="folder for the scripts and their logs (default: isles-slurm)",
    )
    _add(
        group,
        "--shards",
        type=_count,
        metavar="N",
        help="number of tasks in the array (default: so many that each takes about an hour)",
    )
    _add(group, "--cpus", type=_count, default=4, metavar="N", help="CPUs per task (default: 4)")
    _add(group, "--gpu", flag=True, help="request a GPU for each task")
    _add(
        group, "--memory-gb", type=float, metavar="N", help="memory per task in GB (default: the estimate of --dry-run)"
    )
    _add(group, "--hours", type=float, metavar="N", help="time limit per task in hours (default: the estimate)")
    _add(group, "--apptainer", default="", metavar="IMAGE", help="run in this Apptainer image (.sif)")
    _add(group, "--docker", default="", metavar="IMAGE", help="run in this Docker image on the nodes")


def to_arguments(options: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Convert options back to command-line words that parse to the same; defaults are left out, paths are absolute."""
    words = []
    parser = command_parser(options.command)
    for action in (action for action in parser._actions if action.dest in set(names) and hasattr(action, "fallback")):
        value = getattr(options, action.dest)
        if value == action.fallback:
            continue
        flag = action.option_strings[0]
        if action.nargs == 0:
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif isinstance(value, Mapping):
            words += [flag, ",".join(f"{name}={number}" for name, number in value.items())]
        elif isinstance(value, tuple | list):
            words += [flag, ",".join(map(str, value))]
        else:
            words += [flag, str(value.absolute() if isinstance(value, Path) else value)]
    return words


def normalise_bids_app_call(arguments: Sequence[str], commands: Iterable[str]) -> list[str]:
    """Move the positional arguments of a BIDS App call (`BIDS_DIR OUT_DIR LEVEL`, anywhere among options) behind its command."""
    words = list(arguments)
    for at in range(2, len(words)):
        before = words[at - 2 : at]
        if words[at] in LEVELS and not any(word.startswith("-") for word in before):
            if {words[0], before[0]} & set(commands):
                break
            return [BIDS_APP, *before, words[at], *words[: at - 2], *words[at + 1 :]]
    return words


def _command(commands: Any, common: _Parser, name: str, help_: str, description: str) -> _Parser:
    """Add a command with the options of `common`."""
    parser: _Parser = commands.add_parser(
        name, help=help_, parents=[common], argument_default=argparse.SUPPRESS, description=description
    )
    return parser


def _add_evaluate(commands: Any) -> None:
    evaluate = _command(
        commands,
        _messages(),
        "evaluate",
        "measure predicted masks against true ones, as ISLES'22 does; compare methods, groups and clinical scores",
        "Dice, absolute volume difference (ml), absolute lesion count difference and lesion-wise F1 of every case with a"
        " true mask. Masks on different grids are refused. Exit code 3 if a case can't be measured; the others still are."
        " Several methods are compared case by case and ranked, in tables and on one page.",
    )
    evaluate.add_argument(
        "masks",
        type=Path,
        nargs="*",
        default=[],
        metavar="MASKS",
        help="folder of predicted masks (or one mask) for each method, followed by that of the true masks",
    )
    _add(
        evaluate,
        "--out",
        type=Path,
        needed=True,
        metavar="CSV",
        help="table with one row per case. Also writes (for metrics.csv) metrics_summary.csv and metrics_plots.png; with"
        " several methods, --clinical"
        " or --by also metrics_study.html, metrics_study.json and their tables",
    )
    _add(
        evaluate,
        "--clinical",
        type=Path,
        metavar="CSV",
        help="table with the column case and others (nihss, mrs, scanner ...). Reports Spearman's correlation of lesion volume and number,"
        " predicted and true, with each column of numbers",
    )
    _add(
        evaluate,
        "--by",
        type=_names,
        metavar="COLUMN,COLUMN",
        help="group the measures by these columns of --clinical, and by size and number of the true lesions (only by these:"
        " lesion_size)",
    )
    group = evaluate.add_argument_group("reader studies")
    _add(
        group,
        "--reader-study",
        type=Path,
        metavar="HTML",
        help="write an offline page that shows readers two masks of each case, blinded and in random order: of two methods,"
        " or of one method and the"
        " true ones",
    )
    _add(
        group,
        "--images",
        type=Path,
        metavar="DATASET",
        help="images for --reader-study: any dataset that batch accepts",
    )
    _add(
        group,
        "--key",
        type=Path,
        metavar="JSON",
        help="file that says which method made which mask; --reader-study writes it (default: PAGE_key.json beside the"
        " page), --reader-answers"
        " reads it. Keep it from the readers",
    )
    _add(
        group,
        "--reader-answers",
        type=Path,
        nargs="+",
        metavar="CSV",
        help="files that readers saved from the page; used with --key and --out, without masks. Writes preferences with"
        " exact intervals, grades"
        " and the readers' agreement",
    )


def _add_inspect(commands: Any) -> None:
    inspect = _command(
        commands,
        _messages(),
        "inspect",
        "show what an image file, or a folder or .zip of DICOM, contains and which images would be read from it",
        "List every DICOM series with its kind, b-values and geometry, the ones chosen for DWI, ADC and FLAIR and why, notes and"
        " refusals. Exit code 3 if the image of --as can't be read; without --as, if no image can.",
    )
    inspect.add_argument("path", type=Path, metavar="PATH", help="image file, or folder or .zip of DICOM")
    _add(inspect, "--as", choices=("dwi", "adc", "flair"), help="read the path as this image of a case")
    _add(
        inspect,
        "--write",
        type=Path,
        metavar="FILE",
        help="with --as: save the image as the program reads it (.nii.gz, .mha, .nrrd)",
    )
    _add(inspect, "--json", flag=True, help="print JSON")


def _add_listen(commands: Any, common: _Parser) -> None:
    listen = _command(
        commands,
        common,
        "listen",
        "run as a DICOM node that receives studies and sends results",
        "Receive studies by C-STORE (and answer C-ECHO), segment each one when no image of it has arrived for a while,"
        " and send DICOM objects by"
        " C-STORE, retried until they are acknowledged. Unfinished studies are kept in a spool on disk, so that a kill at any moment loses"
        " nothing. A status page shows every study, what happened to it and why, without patient names. DICOM has no passwords:"
        " restrict access to the port to permitted senders.",
    )
    _add(listen, "--aet", default="ISLES", metavar="AET", help="AE title of this node (default: ISLES)")
    _add(listen, "--host", default="0.0.0.0", metavar="ADDRESS", help="address to listen on (default: all)")
    _add(listen, "--port", type=int, default=11112, metavar="N", help="DICOM port (default: 11112)")
    _add(
        listen,
        "--send-to",
        needed=True,
        metavar="AET@HOST:PORT",
        help="destination of the results; several are separated by commas",
    )
    _add(
        listen,
        "--spool",
        type=Path,
        default=Path("/spool"),
        metavar="DIR",
        help="folder of the spool (default: /spool)",
    )
    _add(
        listen,
        "--spool-gb",
        type=float,
        default=20.0,
        metavar="N",
        help="largest size of the images in the spool, in GB, more than 0 (default: 20)",
    )
    _add(listen, "--allow", type=_names, metavar="AET,AET", help="AE titles that may send (default: all)")
    _add(
        listen,
        "--most-associations",
        type=int,
        default=16,
        metavar="N",
        help="largest number of simultaneous associations; further ones are rejected until one ends (default: 16)",
    )
    _add(
        listen,
        "--quiet-seconds",
        type=float,
        default=30.0,
        metavar="N",
        help="a study is complete when no image of it has arrived for this time, more than 0 and at most 3600 (default: 30)",
    )
    _add(
        listen,
        "--keep-hours",
        type=float,
        default=24.0,
        metavar="N",
        help="how long finished studies stay in the spool and on the page, 0 or more, if there is room (default: 24)",
    )
    _add(listen, "--status-port", type=int, default=8080, metavar="N", help="port of the status page (default: 8080)")


def _add_format(parser: Any) -> None:
    _add(
        parser,
        "--format",
        choices=("nii.gz", "mha", "nrrd"),
        default="nii.gz",
        help="file format of the written images (default: nii.gz)",
    )


def _add_contract(group: Any) -> None:
    _add(group, "--input", type=Path, default=Path("/input"), metavar="DIR", help="input root (default: /input)")
    _add(group, "--output", type=Path, default=Path("/output"), metavar="DIR", help="output root (default: /output)")
    _add(group, "--report", flag=True, help="also write report.json, report.html and overlay.png")


def _messages() -> _Parser:
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    _add(parser.add_argument_group("messages"), "--verbose", flag=True, help="log debug messages, too")
    return parser


def _common() -> _Parser:
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS, parents=[_messages()])
    group = parser.add_argument_group("how cases are segmented")
    _add(
        group,
        "--weights",
        type=Path,
        metavar="DIR",
        help="folder with the members (default: /opt/ml/model if it contains weights, else the shipped members)",
    )
    _add(group, "--members", type=_names, metavar="A,B", help="names of the members to use (default: all)")
    _add(
        group,
        "--device",
        choices=get_args(Device),
        default="auto",
        help="device that runs the networks; auto uses a GPU if there is one (default: auto)",
    )
    _add(
        group,
        "--precision",
        choices=get_args(Precision),
        default="auto",
        help="arithmetic of the networks. auto does not change the mask: fp16 on GPUs, fp32 on CPUs. For members pack, the precision of the"
        " packed weights: fp32 (auto), which is lossless, or fp16 (default: auto)",
    )
    _add(
        group,
        "--session",
        choices=get_args(SessionKind),
        default="auto",
        help="runtime of the networks. auto: OpenVINO on the CPU, else torch. onnx and tensorrt need members that were packed with"
        " --onnx (default: auto)",
    )
    _add(
        group,
        "--tta",
        choices=get_args(Tta),
        default="mirror",
        help="test-time augmentation. mirror: all flips; none; gated: flips only for uncertain windows (default: mirror)",
    )
    _add(
        group,
        "--fusion",
        choices=get_args(FusionMethod),
        default="majority",
        help="how the members' predictions are fused into one mask (default: majority)",
    )
    _add(
        group,
        "--min-disputed-ml",
        former="--speck-ml",
        type=float,
        metavar="ML",
        help="remove lesions below this volume (ml) if the members' mean probability is low in all their voxels; 0 keeps all. The former"
        f" name --speck-ml still works (default: from manifest.json, else {MIN_DISPUTED_ML})",
    )
    _add(
        group,
        "--member-weights",
        type=_weights,
        metavar="A=2,B=1",
        help="weights of the members' votes (default: from manifest.json, else 1 each)",
    )
    _add(
        group,
        "--min-lesion-ml",
        type=float,
        metavar="ML",
        help="remove lesions below this volume (ml), even if all members agree (default: from manifest.json, else 0: none)",
    )
    _add(
        group,
        "--min-members",
        type=int,
        metavar="N",
        help="smallest number of members that must vote (default: all for which the needed images are given)",
    )
    _add(
        group,
        "--skull-strip",
        choices=get_args(SkullStrip),
        default="auto",
        help="whether to strip the skull; auto strips it if there is one (default: auto)",
    )
    _add(
        group,
        "--registration",
        choices=get_args(Registration),
        default="auto",
        help="how FLAIR is aligned to the DWI. auto: by registration if that aligns it better than its header. never: by its header,"
        " for a FLAIR that is already registered (default: auto)",
    )
    _add(
        group,
        "--brain-ml",
        type=_range,
        metavar="LOW,HIGH",
        default=RunConfig.brain_ml,
        help="accepted range of the brain volume (ml). Others are refused, because their voxel size may be wrong"
        " (default: {:g},{:g})".format(*RunConfig.brain_ml),
    )
    _add(
        group,
        "--allow-torchscript",
        flag=True,
        help="load TorchScript members, which contain code, even if no manifest.json lists the SHA-256 of their files. Use it only"
        " for files that you trust. members pack converts them to files without code",
    )
    group = parser.add_argument_group("outputs besides the mask")
    _add(group, "--save-probabilities", flag=True, help="also write the mean lesion probability, and each member's")
    _add(
        group,
        "--save-member-masks",
        flag=True,
        help="also write each member's mask, and the number of lesion votes per voxel",
    )
    _add(
        group,
        "--findings",
        choices=("on", "off"),
        help="report the location of the lesion (side, structures, ranges) in report.json and on the page (default: on if a report is"
        " written; on writes one)",
    )
    _add(
        group,
        "--trust",
        choices=("on", "off"),
        help="report how far the mask can be trusted (verdict, expected Dice, scores) in report.json and on the page (default: on if a"
        " report is written; on writes one)",
    )
    _add(
        group,
        "--atlas",
        type=Path,
        metavar="DIR",
        help="folder of label maps in MNI space for the findings: <name>_dseg.nii.gz, each with <name>_dseg.tsv (index, name; optional"
        " group, side); a map called aspects also gives a score, for research",
    )
    _add(
        group,
        "--save-mni",
        flag=True,
        help="also write mask and images in the template's space (MNI152NLin2009aSym, 1 mm)",
    )
    _add(
        group,
        "--dicom",
        flag=True,
        help="also write DICOM objects in the study of the DWI, which must be DICOM: segmentation (SEG), measurement report"
        " (SR), picture (SC)",
    )
    _add(
        group,
        "--dicom-probability",
        flag=True,
        help="as --dicom, and also the mean lesion probability as a fractional SEG",
    )
    return parser


def _add(
    group: Any,
    name: str,
    *,
    former: str = "",
    flag: bool = False,
    needed: bool = False,
    default: Any = None,
    **settings: Any,
) -> None:
    """Add an option, and record its default, whether it is required, and that the environment may set it.

    `former` is what the option was called by earlier versions: it is still understood, as is its variable.

    Argparse itself gets no default (SUPPRESS), so that it tells what was stated from what was not.
    """
    if flag:
        settings |= {"action": argparse.BooleanOptionalAction}
        default = bool(default)
    names = [name, former] if former else [name]
    action = group.add_argument(*names, default=argparse.SUPPRESS, **settings)
    action.fallback, action.needed, action.former = default, needed, former


def _defaults(parser: argparse.ArgumentParser) -> dict[str, Any]:
    return {action.dest: action.fallback for action in parser._actions if hasattr(action, "fallback")}


#: Why a text is not a value of a type, in place of Python's own words.
_NOT_A: Mapping[Any, str] = {int: "not a whole number", float: "not a number"}


def _from_environment(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of `ISLES_...` variables, parsed as the options would be."""
    values: dict[str, Any] = {}
    for action in parser._actions:
        variable = next((name for name in _variables(action) if environment.get(name)), _variables(action)[0])
        text = environment.get(variable, "")
        if not hasattr(action, "fallback") or not text:  # an empty variable is as good as none
            continue
        try:
            values[action.dest] = _read(action, text)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UsageError(
                f"the environment variable {variable} is not valid",
                found=f"{text!r}: {_NOT_A.get(action.type, error)}",
                do="correct the variable or unset it",
            ) from error
        if action.choices is not None and values[action.dest] not in action.choices:
            raise UsageError(
                f"the environment variable {variable} is not valid",
                found=repr(text),
                do=f"use one of: {', '.join(map(str, action.choices))}",
            )
    return values


def _read(action: argparse.Action, text: str) -> Any:
    """Parse a variable as its option would be; several values are separated by commas."""
    if action.nargs == 0:
        return _boolean(text)
    convert: Any = action.type or str
    if action.nargs != "+":
        return convert(text)
    if not (values := [convert(name) for name in _names(text)]):
        raise ValueError("give one value or several, with commas between them")
    return values


def kubernetes_service_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the `ISLES_...` variables that Kubernetes sets for a Service whose name begins with isles, in order.

    For a Service `isles-web` these are ISLES_WEB_SERVICE_HOST, ISLES_WEB_SERVICE_PORT[_NAME], ISLES_WEB_PORT=tcp://ADDRESS:PORT and
    ISLES_WEB_PORT_NUMBER_TCP[_PROTO|_PORT|_ADDR] (Kubernetes documentation, "Service", environment variables).
    """
    services = {match["service"] for name in environment if (match := _SERVICE_HOST.fullmatch(name))}
    services |= {
        match["service"]
        for name, text in environment.items()
        if (match := _SERVICE_PORT.fullmatch(name)) and _SERVICE_URL.match(text)
    }
    links = []
    for name, text in environment.items():
        for service in services:
            told = name.removeprefix(service)
            if told != name and _SERVICE_VARIABLE.fullmatch(told) and (told != "_PORT" or _SERVICE_URL.match(text)):
                links.append(name)
    return sorted(set(links))


def _refuse_unknown(environment: Mapping[str, str], parsers: Sequence[argparse.ArgumentParser]) -> None:
    """Refuse unknown `ISLES_...` variables: a misspelt one would silently change the segmentation."""
    known = {
        name
        for parser in parsers
        for action in parser._actions
        if hasattr(action, "fallback")
        for name in _variables(action)
    }
    unknown = sorted(name for name in environment if name.startswith(ENVIRONMENT_PREFIX) and name not in known)
    if unknown:
        raise UsageError(
            f"no option has the environment variable {', '.join(unknown)}", do=f"use one of: {', '.join(sorted(known))}"
        )


def _variables(action: argparse.Action) -> list[str]:
    """Return the variables of an option: of its name, then of its former name."""
    names = [action.dest, getattr(action, "former", "").removeprefix("--").replace("-", "_")]
    return [ENVIRONMENT_PREFIX + name.upper() for name in names if name]


def _boolean(text: str) -> bool:
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise ValueError("use 1 or 0")


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW,HIGH, two volumes in ml") from None
    return low, high


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _address(text: str) -> str:
    """Parse a cluster's address; refuse a folder, which would mean that the address was left out."""
    if text in ("auto", "local") or re.fullmatch(r"(ray://)?[\w.\-\[\]:]+:\d+", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT or auto: put --ray after the folders")


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, a shard from 1/N to N/N")
    return int(match[1]), int(match[2])


def _weights(text: str) -> dict[str, float]:
    try:
        pairs = [pair.rsplit("=", 1) for pair in text.split(",") if pair.strip()]
        weights = {name.strip(): float(number) for name, number in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER,...") from None
    if len(weights) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names a member twice")
    return weights


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
