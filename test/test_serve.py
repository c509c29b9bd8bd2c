"""grand-challenge's invoke mode, against a server process on loopback; and what it leaves behind when things go wrong."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from conftest import REPOSITORY, slowness, tree, write_contract_case
from ensemble.cli import main
from ensemble.folders import exclusive_writer
from ensemble.serve.serve import open_listening_socket
from ensemble.serve.supervisor import ServerUnavailable, Supervisor
from ensemble.serve.worker import CaseDone, InvokeRequest, WorkerReady
from nnunet_folders import FolderSpec, build_folder

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("ISLES_")}
#: Long enough for a machine that others keep busy.
PATIENCE_S = 240.0
OUTPUTS = {"results.json", "images/stroke-lesion-segmentation/case-1.mha"}


def member(root: Path, name: str, spec: FolderSpec, seed: int = 0) -> dict[str, str]:
    build_folder(root / name, spec, seed=seed)
    return {"name": name, "kind": "nnunet", "folder": f"{name}/nnUNetTrainer__nnUNetPlans__3d_fullres"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick member, and another one that needs FLAIR."""
    root = tmp_path_factory.mktemp("weights")
    quick = FolderSpec(patch=(32, 48, 48), spacing_mm=(5.0, 4.0, 4.0))
    flair = FolderSpec(
        patch=(32, 48, 48),
        spacing_mm=(5.0, 4.0, 4.0),
        channels=("DWI", "ADC", "FLAIR"),
        schemes=("ZScoreNormalization",) * 3,
        use_mask=(True,) * 3,
    )
    members = [member(root, "first", quick, seed=1), member(root, "second", flair)]
    (root / "manifest.json").write_text(json.dumps({"members": members}))
    return root


@pytest.fixture(scope="module")
def slow_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A member that works on a fine grid and takes seconds for a case, so that there is time to disturb it."""
    root = tmp_path_factory.mktemp("slow")
    slow = member(root, "slow", FolderSpec(patch=(32, 48, 48), spacing_mm=(2.0, 2.0, 2.0)))
    (root / "manifest.json").write_text(json.dumps({"members": [slow]}))
    return root


class Running:
    """A server process, and what can be asked of it."""

    def __init__(self, process: subprocess.Popen[str], input_root: Path, output_root: Path) -> None:
        self.process = process
        self.input = input_root
        self.output = output_root
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = int(self.line("listening on").rsplit(":", 1)[1])

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def line(self, beginning: str, after: int = 0) -> str:
        """The first log line that begins so, as soon as there is one."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            for line in self.lines[after:]:
                if line.startswith(beginning):
                    return line
            time.sleep(0.02)
        raise AssertionError(f"no line {beginning!r} in {self.lines}")

    def ask(self, method: str, path: str) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def head(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request("HEAD", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def invoke(self) -> tuple[int, dict[str, Any]]:
        return self.ask("POST", "/invoke")

    def start_invoke(self) -> Callable[[], tuple[int, dict[str, Any]]]:
        """Call /invoke, wait until a member is at work, and return what gives the answer."""
        answers: list[tuple[int, dict[str, Any]]] = []

        def call() -> None:
            answers.append(self.invoke())

        so_far = len(self.lines)
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        self.line("member ", after=so_far)
        time.sleep(0.2)

        def result() -> tuple[int, dict[str, Any]]:
            thread.join(PATIENCE_S)
            assert answers, "the call was never answered"
            return answers[0]

        return result

    def await_ready(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            started = time.monotonic()
            status, body = self.ask("GET", "/health")
            assert time.monotonic() - started < 10 * slowness()
            if status == 200:
                return body
            assert status == 503
        raise AssertionError(f"never ready: {self.lines}")

    def end(self) -> int:
        """Wait for the end, and for the last line."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join(10)
        return code

    def worker(self) -> int:
        """The process that holds the networks: the child with the most memory."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return max(map(int, children), key=lambda pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1]))


@contextmanager
def serving(tmp_path: Path, weights: Path, *options: str, before: str = "", fails: bool = False) -> Iterator[Running]:
    """A server whose case lies in tmp_path/in and whose outputs come to tmp_path/out. stderr stays empty unless something `fails`."""
    input_root, output_root = tmp_path / "in", tmp_path / "out"
    output_root.mkdir(exist_ok=True)
    command = [sys.executable, str(REPOSITORY / "process.py"), "serve", "--host", "127.0.0.1", "--port", "0"]
    command += ["--input", str(input_root), "--output", str(output_root), "--weights", str(weights), "--device", "cpu"]
    command += options
    if before:
        command = ["unshare", "--mount", "bash", "-c", f'{before} && exec "$@"', "bash", *command]
    with (tmp_path / "stderr").open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}
        )
    try:
        yield Running(process, input_root, output_root)
    finally:
        process.kill()
        process.wait()
    said = (tmp_path / "stderr").read_text().splitlines()
    assert bool(said) == fails, said
    assert all(line.startswith(("error: ", "ended with exit code ")) for line in said)


def files(folder: Path) -> set[str]:
    return {name for name, content in tree(folder).items() if content != b"<folder>"}


def mask(output: Path) -> bytes:
    return (output / "images" / "stroke-lesion-segmentation" / "case-1.mha").read_bytes()


def new_case(root: Path, **how: Any) -> None:
    shutil.rmtree(root, ignore_errors=True)
    write_contract_case(root, **how)


@pytest.mark.slow
def test_one_case_after_the_other(tmp_path: Path, weights: Path) -> None:
    write_contract_case(tmp_path / "in", flair=True)
    assert main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "exec"), "--weights", str(weights)]) == 0
    with serving(tmp_path, weights, fails=True) as server:
        body = server.await_ready()
        assert body["members"] == ["first", "second"]
        assert set(body["seconds"]) == {"process", "imports", "weights", "warm-up"}

        status, body = server.invoke()
        assert (status, body["status"], body["voted"]) == (201, "complete", ["first", "second"]), body
        assert tree(server.output) == tree(tmp_path / "exec")

        new_case(server.input, name="case-2")
        status, body = server.invoke()
        assert (status, body["voted"], body["outputs"][0]["filename"]) == (201, ["first"], "case-2.mha")
        assert files(server.output) == {"results.json", "images/stroke-lesion-segmentation/case-2.mha"}

        bad = new_case(server.input) or next((server.input / "images" / "adc-brain-mri").iterdir())
        bad.write_bytes(bad.read_bytes()[:-2000])
        status, body = server.invoke()
        assert (status, body["exit_code"]) == (422, 3)
        assert body["error"]["where"] == str(bad)
        assert body["error"]["do"]
        assert tree(server.output) == {}

        new_case(server.input, flair=True)
        assert server.invoke()[0] == 201
        assert tree(server.output) == tree(tmp_path / "exec")


@pytest.mark.slow
def test_what_others_put_into_the_output_folder_stays(tmp_path: Path, weights: Path) -> None:
    write_contract_case(tmp_path / "in")
    with serving(tmp_path, weights, "--members", "first", "--tta", "none", fails=True) as server:
        (server.output / "notes.txt").write_text("mine")
        assert server.invoke()[0] == 201
        assert files(server.output) == OUTPUTS | {"notes.txt"}
        (server.output / "results.json").write_text("exchanged")
        shutil.rmtree(server.input)
        status, body = server.invoke()
        assert (status, body["error"]["what"]) == (422, "the input folder does not exist")
        assert files(server.output) == {"notes.txt", "results.json"}


@pytest.mark.slow
def test_a_call_leaves_alone_what_another_process_is_writing(tmp_path: Path, weights: Path) -> None:
    write_contract_case(tmp_path / "in")
    with serving(tmp_path, weights, "--members", "first", "--tta", "none", fails=True) as server:
        assert server.invoke()[0] == 201
        before = tree(server.output)
        with exclusive_writer(server.output):
            status, body = server.invoke()
            assert (status, body["exit_code"]) == (500, 2)
            assert "another process" in body["error"]["what"]
            assert tree(server.output) == before
        assert server.invoke()[0] == 201


@pytest.mark.slow
def test_other_routes_are_refused_without_redirects(tmp_path: Path, weights: Path) -> None:
    with serving(tmp_path, weights, "--members", "first", "--tta", "none") as server:
        assert server.ask("GET", "/")[0] == 404
        assert server.ask("GET", "/health/")[0] == 404
        server.await_ready()
        assert server.head("/health") == (200, b"")
        assert server.ask("GET", "/invoke")[0] == 405


@pytest.mark.slow
def test_the_server_answers_while_it_loads_and_while_it_segments(tmp_path: Path, slow_weights: Path) -> None:
    write_contract_case(tmp_path / "in")
    with serving(tmp_path, slow_weights, "--longest-wait", "0.1") as server:
        status, body = server.invoke()
        assert (status, body["error"]["what"]) == (503, "the members are not loaded yet")
        server.await_ready()
        first = server.start_invoke()
        started = time.monotonic()
        assert server.ask("GET", "/health")[0] == 200
        assert time.monotonic() - started < 5 * slowness()
        status, body = server.invoke()
        assert (status, body["error"]["what"]) == (503, "other cases took longer than 0.1 s")
        assert first()[0] == 201


@pytest.mark.slow
def test_calls_wait_for_each_other(tmp_path: Path, weights: Path) -> None:
    write_contract_case(tmp_path / "in")
    with serving(tmp_path, weights, "--members", "first") as server:
        answers: list[int] = []
        threads = [threading.Thread(target=lambda: answers.append(server.invoke()[0])) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert answers == [201] * 3
        assert files(server.output) == OUTPUTS
        # stages of different cases never mix
        stages = [line for line in server.lines if line.endswith(" ...")]
        assert stages == ["prepare ...", "member first ...", "fuse ..."] * 3


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_sigterm_ends_it_within_five_seconds(tmp_path: Path, slow_weights: Path, busy: bool) -> None:
    write_contract_case(tmp_path / "in")
    with serving(tmp_path, slow_weights) as server:
        server.await_ready()
        worker = server.worker()
        answer = server.start_invoke() if busy else None
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 143
        assert time.monotonic() - started < 5 * slowness()
        if answer is not None:
            status, body = answer()
            assert (status, body["error"]["what"]) == (503, "the server was stopped during this case")
        assert not Path(f"/proc/{worker}").exists()
        assert tree(server.output) == {}


@pytest.mark.slow
def test_a_worker_that_is_killed_fails_its_case_and_is_replaced(tmp_path: Path, slow_weights: Path) -> None:
    write_contract_case(tmp_path / "in")
    with serving(tmp_path, slow_weights, "--tta", "none", fails=True) as server:
        server.await_ready()
        answer = server.start_invoke()
        os.kill(server.worker(), signal.SIGKILL)
        status, body = answer()
        assert (status, body["error"]["what"]) == (500, "the segmenting process died")
        assert "memory" in body["error"]["found"]
        assert tree(server.output) == {}
        assert server.invoke()[0] == 201  # it waits for the new one
        assert files(server.output) == OUTPUTS


@pytest.mark.slow
def test_nothing_outlives_a_server_that_is_killed(tmp_path: Path, slow_weights: Path) -> None:
    write_contract_case(tmp_path / "in")
    with serving(tmp_path, slow_weights) as server:
        server.await_ready()
        worker = server.worker()
        so_far = len(server.lines)

        def call() -> None:
            with suppress(OSError, http.client.HTTPException):
                server.invoke()

        threading.Thread(target=call, daemon=True).start()
        server.line("member ", after=so_far)
        server.process.kill()
        until = time.monotonic() + 30
        while Path(f"/proc/{worker}").exists() and time.monotonic() < until:
            time.sleep(0.1)
        assert not Path(f"/proc/{worker}").exists()
        assert tree(server.output) == {}


@pytest.mark.slow
@pytest.mark.parametrize("remove", [True, False])
def test_inputs_that_go_in_mid_case_fail_it(tmp_path: Path, slow_weights: Path, remove: bool) -> None:
    write_contract_case(tmp_path / "in")
    with serving(tmp_path, slow_weights, "--tta", "none", fails=True) as server:
        server.await_ready()
        answer = server.start_invoke()
        if remove:
            shutil.rmtree(server.input)
        else:
            new_case(server.input)
        status, body = answer()
        assert (status, body["exit_code"]) == (422, 3)
        assert "while the case was being segmented" in body["error"]["what"]
        assert tree(server.output) == {}
        new_case(server.input)
        assert server.invoke()[0] == 201


@pytest.mark.slow
def test_a_full_output_volume_is_told_and_left_empty(tmp_path: Path, weights: Path) -> None:
    write_contract_case(tmp_path / "in")
    (tmp_path / "out").mkdir()
    mount = f"mount -t tmpfs -o size=16k none {tmp_path / 'out'}"
    if subprocess.run(["unshare", "--mount", "bash", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("a small volume can't be mounted here; the container test does")
    with serving(tmp_path, weights, "--members", "first", "--save-probabilities", before=mount, fails=True) as server:
        status, body = server.invoke()
        assert (status, body["exit_code"], body["error"]["what"]) == (500, 2, "the outputs can't be written")
        assert tree(Path(f"/proc/{server.process.pid}/root") / str(server.output)[1:]) == {}
        assert server.ask("GET", "/health")[0] == 200


@pytest.mark.slow
def test_an_output_root_that_is_no_folder_is_told(tmp_path: Path, weights: Path) -> None:
    write_contract_case(tmp_path / "in")
    with serving(tmp_path, weights, "--members", "first", "--tta", "none", fails=True) as server:
        server.output.rmdir()
        server.output.write_text("a file")
        status, body = server.invoke()
        assert (status, body["exit_code"]) == (500, 2)
        assert server.output.read_text() == "a file"


@pytest.mark.slow
def test_members_that_cannot_be_loaded_end_it_with_4(tmp_path: Path, weights: Path) -> None:
    spoilt = shutil.copytree(weights, tmp_path / "weights")
    checkpoint = next((spoilt / "second").rglob("checkpoint_final.pth"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with serving(tmp_path, spoilt, fails=True) as server:
        assert server.end() == 4
        assert server.lines[-1].startswith("ended with exit code 4: ")
        assert str(checkpoint) in server.lines[-1]


@pytest.mark.slow
def test_a_worker_that_dies_while_loading_ends_it_with_4(tmp_path: Path, weights: Path) -> None:
    with serving(tmp_path, weights, fails=True) as server:
        os.kill(server.worker(), signal.SIGKILL)
        assert server.end() == 4
        assert "the members could not be loaded: ended by SIGKILL" in server.lines[-1]


def test_a_port_that_is_taken_is_wrong_usage(tmp_path: Path, weights: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--host", "127.0.0.1", "--port", str(port), "--weights", str(weights)]) == 2
    assert f"where: 127.0.0.1:{port}" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("host", "callers"), [("::", ("::1", "127.0.0.1")), ("::1", ("::1",)), ("localhost", ("localhost",))]
)
def test_addresses_of_either_family_can_be_listened_on(host: str, callers: tuple[str, ...]) -> None:
    if ":" in host and not (socket.has_ipv6 and Path("/proc/net/if_inet6").exists()):
        pytest.skip("this machine has no IPv6")
    with open_listening_socket(host, 0) as listening:
        for caller in callers:
            socket.create_connection((caller, listening.getsockname()[1]), timeout=5).close()


def test_a_port_that_can_not_be_is_wrong_usage(weights: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", "127.0.0.1", "--port", "70000", "--weights", str(weights)]) == 2
    assert "where: 127.0.0.1:70000" in capfd.readouterr().out


@pytest.mark.parametrize("patience_s", [0, 0.5])
def test_a_free_turn_is_had_without_waiting(monkeypatch: pytest.MonkeyPatch, patience_s: float) -> None:
    async def ask() -> tuple[Any, str]:
        supervisor, job = Supervisor(None), InvokeRequest(Path(), Path())  # type: ignore[arg-type]
        supervisor.ready = WorkerReady({}, ())
        release = asyncio.Event()

        async def run(job: InvokeRequest) -> CaseDone:
            await release.wait()
            return CaseDone({})

        monkeypatch.setattr(supervisor, "_run", run)
        first = asyncio.create_task(supervisor.segment(job, patience_s))
        await asyncio.sleep(0.05)
        with pytest.raises(ServerUnavailable, match="other cases took longer") as refused:
            await supervisor.segment(job, patience_s)
        release.set()
        return await first, str(refused.value)

    answer, refused = asyncio.run(ask())
    assert answer == CaseDone({})
    assert f"{patience_s:g} s" in refused


def test_what_faces_the_network_holds_no_networks() -> None:
    code = (
        "import sys\nimport ensemble.cli, ensemble.progress, ensemble.serve.serve, ensemble.serve.http\n"
        "heavy = {'torch', 'SimpleITK', 'scipy'} & set(sys.modules)\nsys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_mask_is_an_image(tmp_path: Path, weights: Path) -> None:
    write_contract_case(tmp_path / "in")
    with serving(tmp_path, weights, "--members", "first", "--tta", "none") as server:
        status, body = server.invoke()
    voxels = sitk.GetArrayFromImage(
        sitk.ReadImage(str(server.output / "images" / "stroke-lesion-segmentation" / "case-1.mha"))
    )
    assert status == 201
    assert voxels.dtype == np.uint8
    assert (body["lesions"] > 0) == bool(voxels.any())
