"""How people name images and write worklists: real data sets' names are understood, or refused with a list; nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batch_runs import rows, run_batch, touch, write_case
from ensemble.batch.find import find_cases
from ensemble.errors import InputRefused
from ensemble.evaluate.pairs import find_pairs
from ensemble.readers.imagefile import case_name
from ensemble.types import Modality

NOWHERE = Path("/nowhere")


def found(dataset: Path) -> dict[str, list[str] | str]:
    """Names of the files of each case; of a case with a problem, what it is."""
    return {
        case.name: str(case.problem.what) if case.problem else [path.name for path in case.files.values()]
        for case in find_cases(dataset, NOWHERE)
    }


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        # OpenNeuro ds004889 (SOOP)
        ("sub-1_rec-TRACE_dwi sub-1_rec-ADC_dwi sub-1_FLAIR", "sub-1_rec-TRACE_dwi sub-1_rec-ADC_dwi sub-1_FLAIR"),
        ("sub-1_rec-trace_dwi sub-1_rec-adc_dwi", "sub-1_rec-trace_dwi sub-1_rec-adc_dwi"),
        ("sub-1_acq-TRACE_dwi sub-1_acq-ADC_dwi sub-1_acq-b0_dwi", "sub-1_acq-TRACE_dwi sub-1_acq-ADC_dwi"),
        ("sub-1_desc-trace_dwi sub-1_desc-adc_dwi sub-1_desc-fa_dwi", "sub-1_desc-trace_dwi sub-1_desc-adc_dwi"),
        ("sub-1_TRACE sub-1_ADC sub-1_expADC sub-1_S0map", "sub-1_TRACE sub-1_ADC"),
        ("sub-1_TRACE sub-1_dwi sub-1_ADC", "sub-1_TRACE sub-1_ADC"),
        ("sub-1_rec-TRACE_dwi sub-1_rec-expADC_dwi sub-1_rec-ADC_dwi", "sub-1_rec-TRACE_dwi sub-1_rec-ADC_dwi"),
        ("sub-1_acq-b1000_dwi sub-1_acq-b0_dwi sub-1_acq-b2000_dwi sub-1_ADC", "sub-1_acq-b1000_dwi sub-1_ADC"),
        ("sub-1_part-mag_dwi sub-1_part-phase_dwi sub-1_adc", "sub-1_part-mag_dwi sub-1_adc"),
        ("sub-1_part-real_dwi sub-1_part-imag_dwi sub-1_dwi sub-1_adc", "sub-1_dwi sub-1_adc"),
        ("sub-1_run-01_dwi sub-1_run-02_dwi sub-1_run-01_adc sub-1_run-02_adc", "sub-1_run-02_dwi sub-1_run-02_adc"),
        ("sub-1_run-01_dwi sub-1_run-02_dwi sub-1_run-01_adc", "sub-1_run-01_dwi sub-1_run-01_adc"),
        ("sub-1_run-9_dwi sub-1_run-10_dwi sub-1_run-9_adc sub-1_run-10_adc", "sub-1_run-10_dwi sub-1_run-10_adc"),
        ("sub-1_dwi sub-1_adc sub-1_run-1_FLAIR sub-1_run-2_FLAIR", "sub-1_dwi sub-1_adc sub-1_run-2_FLAIR"),
        (
            "sub-1_run-1_rec-TRACE_dwi sub-1_run-2_rec-TRACE_dwi sub-1_run-1_rec-ADC_dwi sub-1_run-2_rec-ADC_dwi",
            "sub-1_run-2_rec-TRACE_dwi sub-1_run-2_rec-ADC_dwi",
        ),
        ("sub-1_space-ncct_dwi sub-1_dwi sub-1_space-ncct_adc sub-1_adc", "sub-1_dwi sub-1_adc"),
        ("sub-1_space-ncct_dwi sub-1_space-ncct_adc", "sub-1_space-ncct_dwi sub-1_space-ncct_adc"),
        ("sub-1_dwi sub-1_desc-preproc_dwi sub-1_adc sub-1_space-TRACE_FLAIR", "sub-1_dwi sub-1_adc sub-1_space-TRACE_FLAIR"),
        ("sub-1_dwi sub-1_sbref sub-1_adc sub-1_acq-headcoil_FLAIR", "sub-1_dwi sub-1_adc sub-1_acq-headcoil_FLAIR"),
        ("dwi_b1000 dwi_b0 adc_map flair", "dwi_b1000 adc_map flair"),
        ("DWI_b1000 DWI ADCmap T2_FLAIR", "DWI_b1000 ADCmap T2_FLAIR"),
        ("b1000 b0 adc", "b1000 adc"),
        ("17_dwi_b1000 17_dwi_b2000 17_ADC_map 17_T2FLAIR", "17_dwi_b1000 17_ADC_map 17_T2FLAIR"),
        ("17_dwi 17_dwi_adc", "17_dwi 17_dwi_adc"),
        ("trace adc exp_adc phase_dwi dwi_mask", "trace adc"),
    ],
)  # fmt: skip
def test_real_names_are_understood(tmp_path: Path, names: str, taken: str) -> None:
    touch(tmp_path / "sub-1", *(f"{name}.nii.gz" for name in names.split()))
    assert found(tmp_path) == {"sub-1": [f"{name}.nii.gz" for name in taken.split()]}


@pytest.mark.parametrize(
    ("names", "modality", "listed"),
    [
        ("sub-1_acq-A_dwi sub-1_acq-B_dwi sub-1_adc", "DWI", "sub-1_acq-A_dwi.nii, sub-1_acq-B_dwi.nii"),
        ("sub-1_dir-AP_dwi sub-1_dir-PA_dwi sub-1_adc", "DWI", "sub-1_dir-AP_dwi.nii, sub-1_dir-PA_dwi.nii"),
        ("sub-1_run-1_dwi sub-1_run-2_dwi sub-1_adc", "DWI", "sub-1_run-1_dwi.nii, sub-1_run-2_dwi.nii"),
        ("sub-1_run-1_dwi sub-1_run-2_dwi sub-1_run-3_adc", "DWI", "sub-1_run-1_dwi.nii, sub-1_run-2_dwi.nii"),
        ("sub-1_dwi sub-1_run-2_dwi sub-1_run-2_adc", "DWI", "sub-1_dwi.nii, sub-1_run-2_dwi.nii"),
        ("sub-1_dwi sub-1_adc sub-1_ADC_map", "ADC", "sub-1_ADC_map.nii, sub-1_adc.nii"),
        ("sub-1_space-a_dwi sub-1_space-b_dwi sub-1_adc", "DWI", "sub-1_space-a_dwi.nii, sub-1_space-b_dwi.nii"),
        ("sub-1_dwi sub-1_adc sub-1_acq-ax_FLAIR sub-1_acq-sag_FLAIR", "FLAIR", "sub-1_acq-ax_FLAIR.nii, sub-1_acq-sag_FLAIR.nii"),
        ("sub-1_trace sub-1_rec-trace_dwi sub-1_adc", "DWI", "sub-1_rec-trace_dwi.nii, sub-1_trace.nii"),
    ],
)  # fmt: skip
def test_what_no_rule_decides_is_refused_with_a_list(tmp_path: Path, names: str, modality: str, listed: str) -> None:
    touch(tmp_path / "sub-1", *(f"{name}.nii" for name in names.split()))
    (case,) = find_cases(tmp_path, NOWHERE)
    assert case.problem is not None
    assert case.problem.what == f"there is more than one {modality} image"
    assert case.problem.found == listed


def test_what_was_chosen_is_noted(tmp_path: Path) -> None:
    names = ("sub-1_run-1_dwi", "sub-1_run-2_dwi", "sub-1_run-1_adc", "sub-1_run-2_adc", "sub-1_FLAIR")
    touch(tmp_path / "sub-1", *(f"{name}.nii" for name in names))
    (case,) = find_cases(tmp_path, NOWHERE)
    assert case.notes == {
        Modality.DWI: "DWI: sub-1_run-2_dwi.nii is used, not sub-1_run-1_dwi.nii",
        Modality.ADC: "ADC: sub-1_run-2_adc.nii is used, not sub-1_run-1_adc.nii",
    }


@pytest.mark.slow
def test_what_was_chosen_stands_in_the_report(tmp_path: Path, weights: Path) -> None:
    for run in (1, 2):
        write_case(tmp_path / "data" / "sub-1", prefix=f"sub-1_run-{run}_")
    assert run_batch(tmp_path / "data", tmp_path / "out", weights) == 0
    said = rows(tmp_path / "out")["sub-1"]["repairs"]
    assert "DWI: sub-1_run-2_dwi.nii.gz is used, not sub-1_run-1_dwi.nii.gz" in said
    report = json.loads((tmp_path / "out" / "sub-1" / "report.json").read_text())
    assert report["case"]["files"]["adc"].endswith("sub-1_run-2_adc.nii.gz")


def test_patients_called_like_b_values_are_not_joined(tmp_path: Path) -> None:
    touch(tmp_path / "pool", "b1000_dwi.nii", "b1000_adc.nii", "b1200_dwi.nii", "b1200_adc.nii")
    said = found(tmp_path)
    assert said == {"pool/b1000": ["b1000_dwi.nii", "b1000_adc.nii"], "pool/b1200": ["b1200_dwi.nii", "b1200_adc.nii"]}
    (tmp_path / "pool" / "b1000_adc.nii").unlink()
    (tmp_path / "pool" / "b1200_dwi.nii").unlink()
    assert "pool" in found(tmp_path)
    assert isinstance(found(tmp_path)["pool"], str)


def test_folders_that_say_only_what_lies_in_them_hold_no_case_of_their_own(tmp_path: Path) -> None:
    touch(tmp_path / "a", "p/DWI/p_DWI.nii.gz", "p/ADC/p_ADC.nii.gz", "p/FLAIR/p_FLAIR.nii.gz")
    assert found(tmp_path / "a") == {"p": ["p_DWI.nii.gz", "p_ADC.nii.gz", "p_FLAIR.nii.gz"]}
    touch(tmp_path / "b", "DWI/17_dwi.nii", "ADC/17_adc.nii", "DWI/18_dwi.nii", "ADC/18_adc.nii")
    assert found(tmp_path / "b") == {"17": ["17_dwi.nii", "17_adc.nii"], "18": ["18_dwi.nii", "18_adc.nii"]}
    touch(tmp_path / "c", "p/dwi/17_dwi.nii", "p/adc/18_adc.nii")
    assert isinstance(found(tmp_path / "c")["p"], str)


def test_the_isles24_release_is_found(tmp_path: Path) -> None:
    for subject in ("sub-stroke0001", "sub-stroke0002"):
        base, name = f"raw_data/{subject}/ses-02/dwi", f"{subject}_ses-02"
        touch(tmp_path, f"{base}/{name}_dwi.nii.gz", f"{base}/{name}_adc.nii.gz", f"{base}/{name}_dwi.json")
        place = f"derivatives/{subject}/ses-02/{name}"
        touch(
            tmp_path, f"{place}_space-ncct_dwi.nii.gz", f"{place}_space-ncct_adc.nii.gz", f"{place}_lesion-msk.nii.gz"
        )
    assert found(tmp_path) == {
        f"{subject}/ses-02": [f"{subject}_ses-02_dwi.nii.gz", f"{subject}_ses-02_adc.nii.gz"]
        for subject in ("sub-stroke0001", "sub-stroke0002")
    }
    assert found(tmp_path / "derivatives")["sub-stroke0001/ses-02"] == [
        "sub-stroke0001_ses-02_space-ncct_dwi.nii.gz",
        "sub-stroke0001_ses-02_space-ncct_adc.nii.gz",
    ]


def test_soop_as_a_pool_of_files(tmp_path: Path) -> None:
    names = ("sub-1_rec-TRACE_dwi", "sub-1_rec-ADC_dwi", "sub-1_FLAIR", "sub-2_rec-TRACE_dwi", "sub-2_rec-ADC_dwi")
    touch(tmp_path, *(f"{name}.nii.gz" for name in names), "sub-1_space-TRACE_desc-lesion_mask.nii.gz")
    assert {name: len(files) for name, files in found(tmp_path).items()} == {"sub-1": 3, "sub-2": 2}


@pytest.mark.parametrize(
    "described",
    [
        {"channel_names": {"0": "DWI", "1": "ADC", "2": "FLAIR"}},
        {"modality": {"0": "dwi_b1000", "1": "ADC map", "2": "T2-FLAIR"}},
        {"channel_names": {"0": "mri_DWI", "1": "adc", "2": "FLAIR?"}, "file_ending": ".nii.gz"},
    ],
)
def test_channels_of_nnunet_are_what_its_description_says(tmp_path: Path, described: dict[str, object]) -> None:
    data = tmp_path / "Dataset500_Stroke"
    touch(data, *(f"imagesTr/{case}_{n:04}.nii.gz" for case in ("a", "b_1", "sub-9") for n in range(3)))
    touch(data, "labelsTr/a.nii.gz", "imagesTs/c_0000.nii.gz", "imagesTs/c_0001.nii.gz")
    (data / "dataset.json").write_text(json.dumps(described))
    three = {case: [f"{case}_{n:04}.nii.gz" for n in range(3)] for case in ("a", "b_1", "sub-9")}
    assert found(data / "imagesTr") == three
    assert found(data) == {
        "imagesTr/a": three["a"],
        "imagesTr/b_1": three["b_1"],
        "sub-9": three["sub-9"],
        "imagesTs/c": ["c_0000.nii.gz", "c_0001.nii.gz"],
    }


def test_channels_in_another_order(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "a_0002.nii.gz", "a_0003.nii.gz")
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "T1", "1": "FLAIR", "2": "ADC", "3": "DWI"}}')
    assert found(tmp_path) == {"a": ["a_0003.nii.gz", "a_0002.nii.gz", "a_0001.nii.gz"]}


def test_channels_that_nothing_describes_are_refused_with_what_is_missing(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz")
    with pytest.raises(InputRefused) as refused:
        find_cases(tmp_path, NOWHERE)
    assert "dataset.json" in refused.value.do
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "CT"}}')
    with pytest.raises(InputRefused):
        find_cases(tmp_path, NOWHERE)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(InputRefused) as refused:
        find_cases(tmp_path, NOWHERE)
    assert refused.value.what == "dataset.json can't be read"


def test_a_dataset_json_of_another_kind_does_not_matter(tmp_path: Path) -> None:
    touch(tmp_path, "p/dwi.nii", "p/adc.nii")
    (tmp_path / "dataset.json").write_text("{")
    assert found(tmp_path) == {"p": ["dwi.nii", "adc.nii"]}


@pytest.mark.parametrize("name", ["dwi", "dwi_b1000", "b1000", "DWI_trace", "trace", "diffusion"])
def test_a_case_is_called_by_its_folder_where_its_file_says_only_what_it_shows(name: str) -> None:
    assert case_name(Path(f"/data/p7/{name}.nii.gz")) == "p7"


HEADER, A, B = "case,dwi,adc,flair", "A,a/1.nii.gz,a/2.nii.gz,", "B,b/1.nii.gz,b/2.nii.gz,b/3.nii.gz"


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\n" + "\n".join((HEADER, A, B)).replace(",", ";"),
        '"sep=,"\r\n' + "\r\n".join((HEADER, A, B)),
        "sep=\t\n" + "\n".join((HEADER, A, B)).replace(",", "\t"),
        "\ufeffsep=|\n" + "\n".join((HEADER, A, B)).replace(",", "|"),
        "\n\n" + "\n".join((HEADER, A, B)),
        ";;;\r\n" + "\r\n".join((HEADER, "", A, ";;;", B, "")).replace(",", ";"),
        "\n".join((HEADER.upper(), A + "n/a", B)),
        "\n".join((HEADER, A + "N/A ", B)),
        "\n".join((HEADER, A + "None", B)),
        "\n".join((HEADER, A + "-", B)),
        "\n".join((" case , dwi,adc, flair ", "A , a/1.nii.gz , a/2.nii.gz", B)),
        "\n".join((f"{HEADER},site,", f'{A},"x, y"', f"{B},z,")),
        "\n".join((HEADER, A, B)).replace("a/1", "a\\1").replace("b/", ".\\b\\"),
        '"case","dwi","adc","flair"\n"A","a/1.nii.gz","a/2.nii.gz",""\n"B","b/1.nii.gz","b/2.nii.gz","b/3.nii.gz"',
        "\r".join((HEADER, A, B)),
    ],
)
def test_worklists_as_people_write_them(tmp_path: Path, text: str) -> None:
    touch(tmp_path, *(f"{case}/{n}.nii.gz" for case in "ab" for n in (1, 2, 3)))
    (tmp_path / "list.csv").write_bytes(text.encode())
    cases = find_cases(tmp_path / "list.csv", NOWHERE)
    said = {case.name: [str(path.relative_to(tmp_path)) for path in case.files.values()] for case in cases}
    assert said == {"A": ["a/1.nii.gz", "a/2.nii.gz"], "B": ["b/1.nii.gz", "b/2.nii.gz", "b/3.nii.gz"]}


def test_a_worklist_of_a_spreadsheet_in_utf_16(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("case\tdwi\tadc\r\nMüller\td.nii\ta.nii\r\n".encode("utf-16"))
    assert found(tmp_path / "list.txt") == {"Müller": ["d.nii", "a.nii"]}


def test_without_a_case_column_cases_are_called_as_run_calls_them(tmp_path: Path) -> None:
    rows = ("dwi,adc", "p1/dwi.nii.gz,p1/adc.nii.gz", "p2/dwi_b1000.nii.gz,p2/adc.nii.gz", "x/17_dwi.nii,x/17_adc.nii")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    assert list(found(tmp_path / "list.csv")) == ["17_dwi", "p1", "p2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dwi,adc\nx/p/dwi.nii,x/p/adc.nii\ny/p/dwi.nii,y/p/adc.nii", "the worklist names a case twice"),
        (f"{HEADER}\n{A}\n{A}", "the worklist names a case twice"),
        (f"{HEADER},dwi\n{A}", "a column name appears twice in the worklist"),
        (f"{HEADER}\nA,a/1,5.nii.gz,a/2.nii.gz,a/3.nii.gz", "a row of the worklist has more cells than the table has columns"),
        (f'{HEADER}\n"A,a/1.nii.gz,a/2.nii.gz,\n{B}', "the worklist is not a text table"),
        ("A,a/1.nii.gz,a/2.nii.gz", "the worklist lacks columns"),
        ("sep=;\n", "the worklist lacks columns"),
        (f"{HEADER}\n,,a/2.nii.gz,", "a row of the worklist names no case"),
    ],
)  # fmt: skip
def test_a_worklist_that_could_be_misread_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(InputRefused) as refused:
        find_cases(tmp_path / "list.csv", NOWHERE)
    assert refused.value.what == said


@pytest.mark.parametrize("cell", [r"C:\data\1.nii.gz", r"\\server\share\1.nii.gz", "D:/1.nii.gz"])
def test_a_path_of_windows_is_told_from_a_missing_file(tmp_path: Path, cell: str) -> None:
    (tmp_path / "list.csv").write_text(f"{HEADER}\nA,{cell},a/2.nii.gz,\n{B}")
    assert "Windows" in found(tmp_path / "list.csv")["A"]
    assert len(found(tmp_path / "list.csv")["B"]) == 3


def test_columns_that_are_not_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "list.csv").write_text("case,dwi,adc,flare\nA,1.nii,2.nii,3.nii")
    with caplog.at_level("INFO", "ensemble"):
        find_cases(tmp_path / "list.csv", NOWHERE)
    assert "flare" in caplog.text


def test_masks_of_nnunet_are_paired_with_the_results_of_its_images(tmp_path: Path) -> None:
    touch(tmp_path, "data/labelsTr/a.nii.gz", "data/labelsTr/b.nii.gz")
    for case in ("a", "b"):
        place = tmp_path / "out" / f"sub-imagesTr{case}"
        touch(place, f"sub-imagesTr{case}_space-dwi_label-lesion_mask.nii.gz")
        files = {"dwi": str(tmp_path / "data" / "imagesTr" / f"{case}_0000.nii.gz")}
        (place / "report.json").write_text(
            json.dumps({"case": {"name": f"imagesTr/{case}", "files": files}, "batch": {"key": "0"}})
        )
    pairs, _ = find_pairs(tmp_path / "out", tmp_path / "data" / "labelsTr")
    assert [len(pair.predictions) for pair in pairs] == [1, 1]
