"""run.py in a fork behaves as in a new process."""

import subprocess
from pathlib import Path

import pytest
import torch

from kwta_exp import hardware
from tests import forked
from tests.conftest import run_py, run_py_forked


@pytest.mark.parametrize("overrides", [["activation.ratio=1.5"], ["--cfg", "job"]])
def test_a_fork_has_the_output_and_status_of_a_new_process(overrides: list[str], tmp_path: Path) -> None:
    forked, own = (run(*overrides, cwd=tmp_path) for run in (run_py_forked, run_py))
    assert (forked.returncode, forked.stdout, forked.stderr) == (own.returncode, own.stdout, own.stderr)


def test_a_fork_trains_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    weights = []
    for run in (run_py, run_py_forked):
        outputs = tmp_path / run.__name__
        done = run(f"paths.outputs={outputs}", "model=mlp", "suite=none", "training.epochs=1", "runtime=cpu")
        assert done.returncode == 0, done.stderr
        (last,) = outputs.glob("*/s*/checkpoints/last.safetensors")
        weights.append(last.read_bytes())
    assert weights[0] == weights[1]


def test_forks_do_not_share_their_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KWTA_EXP_TEST", "here")
    shown = run_py_forked(
        "paths.data=${oc.env:KWTA_EXP_TEST,nowhere}", "--cfg", "job", "--resolve", cwd=tmp_path
    )
    assert "data: here" in shown.stdout
    monkeypatch.delenv("KWTA_EXP_TEST")
    shown = run_py_forked(
        "paths.data=${oc.env:KWTA_EXP_TEST,nowhere}", "--cfg", "job", "--resolve", cwd=tmp_path
    )
    assert "data: nowhere" in shown.stdout


def test_a_fork_that_exceeds_its_timeout_is_killed(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_py_forked(f"paths.outputs={tmp_path}", "training.epochs=100000", timeout=2)
    assert run_py_forked("activation.ratio=1.5", cwd=tmp_path).returncode == 1


@pytest.mark.parametrize("gpus", [0, 2])
def test_the_server_differentiates_nothing_where_a_gpu_is_visible(
    gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's engine would start a thread for each device, and its forks could not differentiate."""
    passes: list[object] = []
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: gpus)
    monkeypatch.setattr(torch.autograd, "backward", lambda *rest, **more: passes.append(rest))
    forked._compile()
    assert len(passes) == (gpus == 0)
