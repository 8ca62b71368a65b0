"""The same runs on one device, on eight, and on two processes: the same losses, with state and cache really spread."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import arguments, environment, finish, progress, rows

from stackwise_jax.evaluate import main as evaluate

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("devices_worker.py")
STEPS = {"curriculum.steps": 4, "run.save_every": 2, "run.eval_every": 2, "run.eval_batches": 0}
# Corruption and dropout are drawn per example and position, so they must not depend on the devices either.
STACKWISE = STEPS | {"objective.kind": "mlm", "cache.kind": "host"}
RACKWISE = STEPS | {"curriculum.plan": "rackwise", "model.dropout": 0.1}


class Spread:
    """Runs named `stackwise` and `rackwise` in a directory of their own, and what the worker saw of them."""

    def __init__(self, directory: Path):
        self.directory = directory

    def run(self, name: str) -> Path:
        return self.directory / name

    def losses(self, name: str) -> list[float]:
        """Of every step and every held-out measurement, in order."""
        return [row["loss"] if "lr" in row else row["held_out_loss"] for row in rows(self.run(name))]

    def seen(self, key: str, process: int = 0) -> list:
        report = json.loads(Path(f"{self.directory}/report{process}").read_text())
        return [entry[key] for entry in report["seen"] if key in entry]


def worker(directory: Path, runs: dict[str, dict], devices: int, *extra: str, **mesh) -> subprocess.Popen:
    keys = {f"mesh.{key}": value for key, value in mesh.items()}
    argvs = [[*arguments(changes | keys, dir=directory / name), *extra] for name, changes in runs.items()]
    line = [sys.executable, str(WORKER), f"{directory}/report", json.dumps(argvs)]
    directory.mkdir(parents=True, exist_ok=True)
    env, pipe = environment(devices), subprocess.PIPE
    return subprocess.Popen(line, env=env, stdout=pipe, stderr=pipe, text=True)


def two_workers(directory: Path, runs: dict[str, dict], devices: int, *extra: str, **mesh) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    mesh |= {"coordinator": coordinator, "num_processes": 2}
    return [worker(directory, runs, devices, *extra, process_id=i, **mesh) for i in range(2)]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory) -> Spread:
    directory = tmp_path_factory.mktemp("one")
    finish(worker(directory, {"stackwise": STACKWISE, "rackwise": RACKWISE}, devices=1))
    return Spread(directory)


def assert_same_losses(ours: Spread, reference: Spread, name: str):
    losses = reference.losses(name)
    assert len(losses) > 5 and len(set(losses)) == len(losses) and losses[-1] < losses[0]
    assert ours.losses(name) == pytest.approx(losses, rel=1e-4)


def test_one_device_holds_everything(one_device):
    assert set(one_device.seen("learning") + one_device.seen("optimizer") + one_device.seen("chunk")) == {1.0}


def test_eight_devices_that_share_the_batch(one_device, tmp_path):
    finish(worker(tmp_path, {"stackwise": STACKWISE, "rackwise": RACKWISE}, devices=8, data=8))
    eight = Spread(tmp_path)
    assert_same_losses(eight, one_device, "stackwise")
    assert_same_losses(eight, one_device, "rackwise")
    assert set(eight.seen("examples") + eight.seen("hidden") + eight.seen("chunk")) == {1 / 8}
    assert set(map(tuple, eight.seen("memory_kinds"))) == {("pinned_host",)}
    assert set(eight.seen("learning")) == {1.0}


def test_eight_devices_that_also_share_the_weights(one_device, tmp_path):
    on_disk = STACKWISE | {"cache.kind": "disk"}
    finish(worker(tmp_path, {"stackwise": on_disk, "rackwise": RACKWISE}, devices=8, data=2, fsdp=4))
    eight = Spread(tmp_path)
    assert_same_losses(eight, one_device, "stackwise")
    assert_same_losses(eight, one_device, "rackwise")
    assert set(eight.seen("hidden")) == {1 / 8}
    for share in eight.seen("learning") + eight.seen("optimizer") + eight.seen("after"):
        assert share < 0.26  # a quarter, and a scalar or two
    assert eight.seen("bytes") == one_device.seen("bytes") and eight.seen("memory_kinds")[0] == []


def test_two_processes_that_share_the_batch(one_device, tmp_path, capsys):
    runs = {"stackwise": STACKWISE | {"run.tensorboard": "true"}, "rackwise": RACKWISE}
    processes = two_workers(tmp_path, runs, 1, "--json")
    outputs = [finish(process)[0] for process in processes]
    two = Spread(tmp_path)
    assert_same_losses(two, one_device, "stackwise")
    assert_same_losses(two, one_device, "rackwise")
    for process in range(2):
        assert set(two.seen("hidden", process)) == {1 / 2}
        assert two.seen("bytes", process) == [n // 2 for n in one_device.seen("bytes")]

    # Only the first process talks and writes.
    answers = [json.loads(line) for line in outputs[0].splitlines() if line.startswith("{")]
    assert [answer["plan"] for answer in answers] == ["stackwise", "rackwise"]
    assert [line for line in outputs[1].splitlines() if "Gloo" not in line] == []
    assert len(list(two.run("stackwise").glob("tensorboard/*"))) == 1

    # What two processes trained is measured by one.
    assert evaluate([str(two.run("stackwise")), "--draws", "1", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["loss"] == pytest.approx(two.losses("stackwise")[-1], rel=1e-5)


def test_two_processes_that_share_the_weights_stop_together_and_go_on(one_device, tmp_path, capsys):
    """Each weight lies on the devices of both processes, so both write it; a signal to one of them stops both."""
    runs = {"stackwise": STACKWISE | {"cache.kind": "disk"}}
    processes = two_workers(tmp_path, runs, 2, data=1, fsdp=4)
    deadline = time.monotonic() + 200
    while not rows(tmp_path / "stackwise") and processes[0].poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGINT)
    for process in processes:
        finish(process, code=130)
    stopped = progress(tmp_path / "stackwise")
    assert stopped is not None and not stopped.finished and stopped.global_step > 0

    for process in two_workers(tmp_path, runs, 2, data=1, fsdp=4):
        finish(process)
    two = Spread(tmp_path)
    assert_same_losses(two, one_device, "stackwise")
    for share in two.seen("learning", 1) + two.seen("optimizer", 1):
        assert share < 0.26
    assert evaluate([str(two.run("stackwise")), "--depth", "2", "--draws", "1", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    result = json.loads((two.run("stackwise") / "summary.json").read_text())["phases"][1]
    assert answer["loss"] == pytest.approx(result["held_out_loss"], rel=1e-4)


CURRICULA = {
    "adapters": STEPS | {"curriculum.plan": "append", "curriculum.trunk": "adapt", "curriculum.adapters.merge": "true"},
    "growth": STEPS
    | {"curriculum.plan": "grow", "curriculum.init": "copy", "objective.kind": "diffusion", "objective.time": "input"},
}


def test_adapters_growth_and_time_on_devices_that_share_each_weight(tmp_path):
    finish(worker(tmp_path / "one", CURRICULA, devices=1))
    finish(worker(tmp_path / "four", CURRICULA, devices=4, data=2, fsdp=2))
    one, four = Spread(tmp_path / "one"), Spread(tmp_path / "four")
    assert max(four.seen("learning") + four.seen("optimizer")) < 0.7
    for name in CURRICULA:
        assert four.losses(name) == pytest.approx(one.losses(name), rel=1e-4), name
