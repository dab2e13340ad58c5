"""run.py as a command: messages, exit status, the run folder, kills."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.numpy import load_file

from kwta_exp.errors import UserError
from tests.conftest import ROOT, TINY, run_py, run_py_forked
from tests.launched import message_of
from tests.stored import forge
from tests.test_checkpoint import Hostile

UNATTACKED = [override for override in TINY if not override.startswith("attack")] + ["suite=none"]

WRONG = [
    (["activation.ratio=1.5"], "activation.ratio=1.5"),
    (["activation.ratio=abc"], "activation.ratio='abc'"),
    (["activation.rato=0.1"], "activation.rato"),
    (["activation=maxout"], "activation=maxout: no option of the group activation; expected one of kwta, "),
    (["activation=lwta", "activation.group_size=3"], "activation.group_size=3"),
    (["model.hidden=-5"], "model.hidden=-5"),
    (["model.channels=[8,8]"], "model.channels=[8, 8]"),
    (
        ["dataset=imagenet"],
        "dataset=imagenet: no option of the group dataset; did you mean image_folder?;",
    ),
    (["dataset=fashion_mnist", "paths.data=nowhere"], "dataset.root=nowhere (paths.data)"),
    (["dataset=arrays"], "dataset.path: missing"),
    (["dataset=arrays", "dataset.path=nowhere.npz"], "dataset.path=nowhere.npz"),
    (["runtime.precision=fp8"], "runtime.precision='fp8'"),
    (["threat.eps=-1"], "threat.eps=-1"),
    (["threat.norm=l7"], "threat.norm='l7'"),
    (["training=pgd", "training.attack.steps=0"], "training.attack.steps=0"),
    (["training=pgd", "training.search=quick"], "training.search='quick'"),
    (["training.epochs=0"], "training.epochs=0"),
    (["training.batch_size=true"], "training.batch_size=True"),
    (["optimizer.lr=-1"], "optimizer.lr=-1"),
    (["optimizer.lr=fast"], "optimizer.lr='fast'"),
    (["optimizer.nesterov=flase"], "optimizer.nesterov='flase'"),
    (["optimizer=adam", "optimizer.betas=[0.9]"], "optimizer: "),
    (["lr_schedule.T_max=0"], "lr_schedule: "),
    (["+weigths=net.pth"], "weigths: unknown key"),
    (["lr_schedule.T_max=long"], "lr_schedule.T_max='long'"),
    (["seed=x"], "seed='x'"),
    (["evaluation.n=0"], "evaluation.n=0"),
    (["attack.pgd.steps=many"], "attack.pgd.steps='many'"),
    (["+attack@attack.mine=nothing"], "+attack@attack.mine=nothing: no option of the group attack"),
    (
        ["threat=l2", "+attack@attack.noise=noise"],
        "attack.noise: LinfRepeatedAdditiveUniformNoiseAttack works in",
    ),
    (
        ["+attack.mine={_target_: foolbox.attacks.L2FMNAttack}"],
        "attack.mine: foolbox's L2FMNAttack is not to be used",
    ),
    (["training=none"], "weights=null"),
    (["weights=nowhere.pth"], "weights=nowhere.pth"),
    (["weights=hostile.pth"], "weights=hostile.pth: refused"),
    (["weights=ftp://example.org/net.pth"], "weights=ftp://example.org/net.pth: expected a path, or a URL"),
    (["weights_sha256=abc"], "weights_sha256='abc'"),
    (["model=resnet18", "model.depth=20"], "model.depth=20"),
    (["model=wrn", "model.depth=21"], "model: depth=21 is not"),
    (["model=torchvision", "model.name=resnet19"], "model.name='resnet19'"),
    (["model=vgg"], "model: "),  # the digits are too small for VGG
    (["sparsity=incremental", "sparsity.final=0.3"], "sparsity: final=0.3 is above start=0.1"),
    (["activation=relu", "sparsity=linear"], "sparsity.start"),
    (["training.label_smoothing=1"], "training.label_smoothing=1"),
    (["training=trades", "training.beta=0"], "training.beta=0"),
    (["dataset=image_folder", "dataset.root=nowhere"], "dataset.root=nowhere"),
    (["scale=huge"], "scale=huge: no option of the group scale; expected one of full, tiny"),
    (
        ["threat.eps=8"],
        "threat.eps=8: pixels lie in [0, 1]; expected an L-inf radius of at most 1, such as 8/255",
    ),
    (
        ["threat=l2", "threat.eps=8.5"],
        "threat.eps=8.5: pixels lie in [0, 1]; expected an L2 radius of at",
    ),
    (["attack.pgd.eps=16"], "attack.pgd.eps=16: pixels lie in [0, 1]"),
    (
        ["dataset=arrays", "dataset.path=from1.npz"],
        "from 1 to 3; expected them counted from 0: save y_train - 1",
    ),
    (
        ["dataset=arrays", "dataset.path=nchw.npz"],
        "12 channels of 3x32 pixels; expected (N, H, W, C): save x_",
    ),
    (["dataset=arrays", "dataset.path=float.npz"], "x_train is float64 (6, 8, 8, 1); expected uint8"),
    (
        ["dataset=arrays", "dataset.path=lacking.npz"],
        "has no x_train, x_test, y_test; expected x_train, y_train, x_test, y_test; found images, y_train",
    ),
    (["scale=tiny", "dataset=arrays", "dataset.path=nowhere.npz"], "dataset.path=nowhere.npz: no such file"),
    (["scale=tiny", "dataset=image_folder", "dataset.root=nowhere"], "dataset.root=nowhere: no folder"),
    (["attack=deepfool"], "attack=deepfool: attacks have names; expected +attack@attack.deepfool=deepfool"),
    (["+attack=deepfool"], "has no name; expected +attack@attack.NAME=OPTION"),
    (["traning=pgd"], "traning=pgd: unknown key traning; did you mean training=pgd?"),
    (["+activation.ratios=0.2"], "activation.ratios: unknown key; did you mean activation.ratio?"),
    (["activation.ratios=0.2"], "unknown key activation.ratios; did you mean activation.ratio?"),
    (["activation=kwtaa"], "activation=kwtaa: no option of the group activation; did you mean kwta?"),
    (["~model"], "model: a run needs one option; expected model=OPTION"),
    (["~sparsity"], "sparsity: a run needs one option; expected sparsity=OPTION"),
    (["+threat=l2"], "+threat=l2: threat is chosen by default; expected threat=l2"),
    (["threat=digits"], "threat=digits: no option of the group threat; expected one of l2, linf"),
    (["recipe=cifar10"], "recipe='cifar10': expected recipe.epochs=N, recipe.batch_size=N and recipe.lr=X"),
    (["~seed"], "seed"),
    (["~nothing"], "~nothing: unknown key nothing"),
    (["scale=[]"], "scale: a run needs one option; expected scale=OPTION"),
    (["scale=null"], "scale=null: no option of the group scale; expected one of full, tiny"),
    (["activation._partial_=3"], "activation._partial_=3: expected true or false"),
    (["activation._partial_=false"], "activation._partial_=False: expected true"),
    (["activation._target_=os.remove"], "activation._target_=os.remove: nothing in Python's standard library"),
    (
        ["sparsity._target_=torch.nn.ReLU"],
        "sparsity._target_=torch.nn.ReLU: makes a ReLU; expected a kwta_exp.",
    ),
    (["dataset=-1"], "dataset=-1: no option of the group dataset"),
    (["optimizer.fused=abc"], "optimizer.fused='abc': expected true or false"),
    (["seed=" + "9" * 5000], "characters left out"),
    (["weights=" + "w" * 5000], "expected a checkpoint or a run folder"),
    (["activation.ratio='" + "x" * 5000 + "'"], "characters left out"),
    (["seed=1,2"], "seed=1,2: several values; expected one, or -m first for a grid"),
    (["seed"], "seed: not an override; expected KEY=VALUE"),
    (["seed=[1"], "seed=[1: the value cannot be read"),
    (["+seed=3"], "+seed=3: seed exists already; expected seed=3"),
    (["point=relu"], "point=relu: point is not chosen by default; expected +point=relu"),
    (["activation.ratio=${nothing}"], "activation.ratio: Interpolation key 'nothing' not found"),
    (["hydra.foo=1"], "Could not override 'hydra.foo'"),
] + ([] if torch.cuda.is_available() else [(["runtime=gpu"], "runtime.accelerator='cuda'")])


SOME = WRONG[::7]


def wrong_files(folder: Path) -> None:
    """The files that wrong overrides name."""
    torch.save({"x": Hostile(folder / "outputs" / "code-ran")}, folder / "hostile.pth")
    x, y = np.zeros((6, 8, 8, 1), np.uint8), np.arange(6) % 3
    good = {"x_train": x, "y_train": y, "x_test": x, "y_test": y}
    for name, changed in {
        "from1": {"y_train": y + 1, "y_test": y + 1},
        "nchw": {"x_train": np.zeros((6, 3, 32, 12), np.uint8), "x_test": np.zeros((6, 3, 32, 12), np.uint8)},
        "float": {"x_train": x / 255},
    }.items():
        np.savez(folder / f"{name}.npz", **(good | changed))
    np.savez(folder / "lacking.npz", images=x, y_train=y)


@pytest.mark.parametrize(("overrides", "named"), WRONG, ids=[" ".join(each)[:60] for each, _ in WRONG])
def test_wrong_override_gives_one_message_and_writes_no_file(
    overrides: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_files(tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    message = message_of(["paths.outputs=outputs", *overrides])
    assert message
    assert named in message
    assert "Traceback" not in message
    assert len(message) < 2000
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("overrides", "named"), SOME, ids=[" ".join(each)[:60] for each, _ in SOME])
def test_wrong_override_exits_with_status_1(overrides: list[str], named: str, tmp_path: Path) -> None:
    """The same in a process of its own, for some of them."""
    wrong_files(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = run_py_forked("paths.outputs=outputs", *overrides, cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert named in said
    assert "Traceback" not in said
    assert said.count("HYDRA_FULL_ERROR=1") == 1, said
    assert len(done.stderr) < 2000
    assert sorted(tmp_path.iterdir()) == before


def test_full_error_variable_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for override in ("traning=pgd", "seed=x"):
        done = subprocess.run(
            [sys.executable, str(ROOT / "run.py"), override],
            capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert "Traceback" in done.stderr


def loaded_modules(*overrides: str, cwd: Path) -> tuple[str, str]:
    """Stdout of run.py, and the names of all modules it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "run.py"), *overrides],
        capture_output=True, text=True, check=True, cwd=cwd,
    )  # fmt: skip
    return done.stdout, done.stderr


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"]])
def test_help_and_config_do_not_load_torch(flags: list[str], tmp_path: Path) -> None:
    said, modules = loaded_modules(*flags, cwd=tmp_path)
    assert "activation" in said
    assert "hydra" in modules
    assert " torch\n" not in modules
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of one tiny run."""
    outputs = tmp_path_factory.mktemp("finished")
    done = run_py_forked(f"paths.outputs={outputs}", *TINY)
    assert done.returncode == 0, done.stderr
    assert "worst case" in done.stdout
    assert "Verdict: " in done.stdout
    assert done.stderr == ""  # no progress bar without a terminal, and no warning
    return outputs


def only_folder(outputs: Path) -> Path:
    (folder,) = outputs.glob("*/s*")
    return folder


def test_run_folder_has_the_documented_files(finished: Path) -> None:
    folder = only_folder(finished)
    assert folder.parent.name == "digits-mlp-kwta0.1-natural"
    assert folder.name.startswith("s0-")
    files = {
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "evaluation" not in p.parts
    }
    assert files == {
        "config.yaml", "overrides.yaml", "run.log", "environment.json", "metrics.jsonl", "results.json",
        "attempts.jsonl", "report.html",
        "checkpoints/best.safetensors", "checkpoints/last.safetensors", "checkpoints/state.pt",
    }  # fmt: skip
    (evaluation,) = (folder / "evaluation").iterdir()
    assert evaluation.name.startswith("quick-")
    assert {p.name for p in evaluation.iterdir()} == {
        "clean.npz",
        "fgsm.npz",
        "pgd.npz",
        "bpda.npz",
        "evaluation.json",
        "results.json",
    }
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in metrics] == [1, 2]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["runtime"] == {
        "accelerator": "cpu",
        "devices": 1,
        "precision": "32-true",
        "channels_last": False,
        "compile": False,
        "threads": 1,
    }
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert "worst case" in (folder / "run.log").read_text()


def test_results_json_has_the_documented_keys(finished: Path) -> None:
    folder = only_folder(finished)
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == [
        "schema", "run", "threat", "clean", "attacks", "worst_case", "inapplicable", "masking", "evaluation",
        "checksum",
    ]  # fmt: skip
    assert results["schema"] == 1
    assert results["threat"] == {"norm": "linf", "eps": 0.1}
    assert list(results["attacks"]) == ["fgsm", "pgd", "bpda"]
    fields = {"robust_accuracy", "n", "ci95", "cumulative", "eps", "norm", "forwards", "backwards", "seconds"}
    assert set(results["attacks"]["pgd"]) == fields
    assert results["attacks"]["bpda"]["activations_replaced"] == 1
    assert results["worst_case"]["n"] == 40
    assert results["run"]["command"].startswith("python run.py")
    # The accuracies follow from the records.
    (evaluation,) = (folder / "evaluation").iterdir()
    with np.load(evaluation / "pgd.npz") as pgd, np.load(evaluation / "clean.npz") as clean:
        right = clean["prediction"] == clean["label"]
        assert pgd["index"].tolist() == clean["index"][right].tolist()
        assert results["attacks"]["pgd"]["robust_accuracy"] == (~pgd["fooled"]).sum() / 40
    assert results["worst_case"]["robust_accuracy"] <= results["attacks"]["pgd"]["robust_accuracy"]


def test_repeated_command_changes_nothing_and_does_not_load_torch(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in only_folder(finished).rglob("*")}
    said, modules = loaded_modules(f"paths.outputs={finished}", *TINY, cwd=ROOT)
    assert "already finished" in said
    assert " torch\n" not in modules
    assert " sklearn" not in modules
    assert {p: p.stat().st_mtime_ns for p in only_folder(finished).rglob("*")} == before


def test_another_suite_adds_an_evaluation_without_training(finished: Path) -> None:
    folder = only_folder(finished)
    weights = (folder / "checkpoints" / "last.safetensors").stat().st_mtime_ns
    done = run_py_forked(f"paths.outputs={finished}", *UNATTACKED, "+attack@attack.deepfool=deepfool")
    assert done.returncode == 0, done.stderr
    assert "epoch 1/" not in done.stdout
    assert only_folder(finished) == folder
    assert len(list((folder / "evaluation").iterdir())) == 2
    assert list(json.loads((folder / "results.json").read_text())["attacks"]) == ["deepfool"]
    assert (folder / "checkpoints" / "last.safetensors").stat().st_mtime_ns == weights


@pytest.mark.parametrize("file", ["", "checkpoints/best.safetensors"])
def test_training_none_evaluates_a_run(finished: Path, tmp_path: Path, file: str) -> None:
    source = only_folder(finished)
    done = run_py_forked(f"paths.outputs={tmp_path}", "training=none", f"weights={source / file}", *TINY[3:])
    assert done.returncode == 0, done.stderr
    folder = only_folder(tmp_path)
    assert folder.parent.name == "digits-mlp-kwta0.1-none"  # the recorded model
    judged = json.loads((folder / "results.json").read_text())
    (evaluation,) = (source / "evaluation").glob("quick-*")
    original = json.loads((evaluation / "results.json").read_text())
    for name in ("fgsm", "pgd", "bpda"):
        assert judged["attacks"][name]["robust_accuracy"] == original["attacks"][name]["robust_accuracy"]


def test_untrusted_run_folder_cannot_build_foreign_classes(finished: Path, tmp_path: Path) -> None:
    """config.yaml of a run folder may name any function."""
    folder = tmp_path / "sent"
    shutil.copytree(only_folder(finished), folder)
    proof = tmp_path / "code-ran"
    config = OmegaConf.load(folder / "config.yaml")
    config.dataset = {
        "_target_": "pathlib.Path.mkdir",
        "self": {"_target_": "pathlib.Path", "_args_": [str(proof)]},
    }
    OmegaConf.save(config, folder / "config.yaml")
    forge(folder)
    done = run_py_forked(f"paths.outputs={tmp_path / 'out'}", "training=none", f"weights={folder}")
    assert done.returncode == 1
    assert "pathlib.Path.mkdir, which is not a class of this project" in done.stderr
    assert "Traceback" not in done.stderr
    assert not proof.exists()


def test_temporary_files_of_a_killed_run_are_removed(finished: Path) -> None:
    folder = only_folder(finished)
    leftover = folder / "checkpoints" / ".state.pt.x1y2.partial"
    leftover.write_bytes(b"half")
    (evaluation,) = (folder / "evaluation").glob("quick-*")
    results = (evaluation / "results.json").read_text()
    (evaluation / "results.json").unlink()  # killed just before the last file
    done = run_py_forked(f"paths.outputs={finished}", *TINY)
    assert done.returncode == 0, done.stderr
    assert not leftover.exists()
    again = json.loads((evaluation / "results.json").read_text())
    assert again["attacks"] == json.loads(results)["attacks"]


def test_rerun_renames_the_old_folder(tmp_path: Path) -> None:
    command = [f"paths.outputs={tmp_path}", *UNATTACKED, "training.epochs=1"]
    assert run_py_forked(*command).returncode == 0
    folder = only_folder(tmp_path)
    weights = (folder / "checkpoints" / "last.safetensors").read_bytes()
    done = run_py_forked(*command, "rerun=true")
    assert done.returncode == 0, done.stderr
    (aside,) = folder.parent.glob("*-before-*")
    for place in (folder, aside):
        assert (place / "checkpoints" / "last.safetensors").read_bytes() == weights


def test_grid_with_a_failing_job_completes_the_others(tmp_path: Path) -> None:
    command = [
        "-m",
        f"paths.outputs={tmp_path}",
        *TINY,
        "activation=relu,lwta",
        "optimizer.lr=0.05,1e30",
        "seed=0",
    ]
    done = run_py_forked(*command)
    assert done.returncode == 1
    assert len(list(tmp_path.glob("*/s*/results.json"))) == 2
    assert done.stdout.count("FAILED") == 2
    assert "training diverged in epoch 1: the loss is nan" in done.stderr
    assert "Traceback" not in done.stderr
    again = run_py_forked(*command)
    assert again.stdout.count("already finished") == 2


def test_config_dir_adds_user_activation_and_attack(
    tmp_path: Path, arrays_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    for group in ("activation", "attack"):
        (mine / group).mkdir(parents=True)
    (mine / "activation" / "gelu.yaml").write_text("_target_: torch.nn.GELU\n_partial_: true\n")
    (mine / "attack" / "invert.yaml").write_text("_target_: my_attack.Invert\nby: 0.5\n")
    (tmp_path / "my_attack.py").write_text(
        "class Invert:\n    def __init__(self, by): self.by = by\n"
        "    def __call__(self, model, x, y, keys): return x + self.by * (1 - 2 * x)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run_py_forked(
        "--config-dir", str(mine), "activation=gelu", "dataset=arrays", f"dataset.path={arrays_file}",
        "+attack@attack.invert=invert", f"paths.outputs={tmp_path / 'out'}", *TINY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = only_folder(tmp_path / "out")
    assert folder.parent.name == "arrays-mlp-gelu-natural"
    (described,) = (folder / "evaluation").glob("*/evaluation.json")
    assert list(json.loads(described.read_text())["identity"]["code"]) == ["my_attack"]
    assert list(json.loads((folder / "results.json").read_text())["attacks"]) == ["fgsm", "pgd", "invert"]
    assert "bpda" in json.loads((folder / "results.json").read_text())["inapplicable"]


def test_second_process_on_the_same_run_is_refused(finished: Path) -> None:
    from filelock import FileLock

    folder = only_folder(finished)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        done = run_py_forked(f"paths.outputs={finished}", *TINY, "rerun=true")
    assert folder.exists()
    assert done.returncode == 1
    assert "another process" in done.stderr
    assert "Traceback" not in done.stderr


def outcome(outputs: Path) -> dict[str, bytes | list[object]]:
    """What must not depend on kills: the weights, and the record of each image."""
    folder = only_folder(outputs)
    weights = {
        f"{name}/{key}": value.tobytes()
        for name in ("best", "last")
        for key, value in load_file(folder / "checkpoints" / f"{name}.safetensors").items()
    }
    rows: dict[str, bytes | list[object]] = {}
    for path in sorted((folder / "evaluation").glob("*/*.npz")):
        with np.load(path) as file:
            rows |= {
                f"{path.name}/{c}": file[c].tobytes() for c in file.files if c not in ("seconds", "checksum")
            }
    return {**weights, **rows}


@pytest.mark.slow
def test_ten_kills_do_not_change_weights_or_records(tmp_path: Path) -> None:
    """Kill -9 at ten moments spread over the work of one run, at least three of them in the evaluation."""
    epochs, chunk = 12, 20
    command = ["training=pgd", f"training.epochs={epochs}", "training.batch_size=64",
               f"evaluation.batch_size={chunk}", "attack.pgd.restarts=3", "attack.pgd.steps=60",
               "runtime=cpu", "runtime.threads=2"]  # fmt: skip
    assert run_py(f"paths.outputs={tmp_path / 'calm'}", *command).returncode == 0
    calm = only_folder(tmp_path / "calm")
    begun, trained, ended = (
        (calm / name).stat().st_mtime
        for name in ("environment.json", "checkpoints/last.safetensors", "results.json")
    )
    (record,) = calm.glob("evaluation/*/bpda.npz")
    with np.load(record) as file:
        rows = len(file["index"])

    # Moments of the calm run, identified by what is on disk then: epochs trained, images attacked.
    outputs = tmp_path / "killed"
    in_evaluation = 0
    for number in range(10):
        moment = begun + (number + 0.5) / 10 * (ended - begun)
        evaluating = moment > trained
        in_evaluation += evaluating
        share = (moment - trained) / (ended - trained) if evaluating else (moment - begun) / (trained - begun)
        wanted = int(share * (rows // chunk)) * chunk if evaluating else int(share * epochs)

        def done(evaluating: bool = evaluating) -> int:
            if not evaluating:
                return sum(len(p.read_text().splitlines()) for p in outputs.glob("*/s*/metrics.jsonl"))
            for path in outputs.glob("*/s*/evaluation/*/bpda.npz"):
                with np.load(path) as file:
                    return len(file["index"])
            return 0 if list(outputs.glob("*/s*/evaluation/*/clean.npz")) else -1

        process = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), f"paths.outputs={outputs}", *command],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while done() < wanted or not list(outputs.glob("*/s*/environment.json")):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        time.sleep(0.02 * number)  # not always right after a save
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed {'evaluating' if evaluating else 'training'} at {wanted}, {share:.0%}")

    assert in_evaluation >= 3
    assert run_py(f"paths.outputs={outputs}", *command).returncode == 0
    assert outcome(outputs) == outcome(tmp_path / "calm")


def rows_judged(outputs: Path) -> int:
    total = 0
    for path in outputs.glob("*/s*/evaluation/**/*.npz"):
        with np.load(path) as file:
            total += len(file["index"])
    return total


@pytest.mark.slow
def test_five_kills_and_two_processes_do_not_change_records(tmp_path: Path) -> None:
    """Kill -9 at five moments spread over one evaluation: attacks and checks."""
    trained = tmp_path / "trained"
    assert run_py(f"paths.outputs={trained}", "suite=none", "training.epochs=15").returncode == 0
    command = ["training=none", f"weights={only_folder(trained)}", "suite=strong", "evaluation.n=16",
               "evaluation.checks_n=4", "evaluation.batch_size=4", "attack.autoattack.steps=10",
               "attack.autoattack.queries=200", "attack.square.queries=200", "attack.es.steps=10",
               "runtime=cpu", "runtime.threads=1"]  # fmt: skip
    calm, killed, parallel = (tmp_path / name for name in ("calm", "killed", "parallel"))
    assert run_py(f"paths.outputs={calm}", *command, timeout=3600).returncode == 0
    total = rows_judged(calm)

    for number in range(5):
        wanted = int((number + 0.5) / 5 * total)
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), f"paths.outputs={killed}", *command],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while rows_judged(killed) < wanted:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed at {rows_judged(killed)} of {total} rows")
    assert run_py(f"paths.outputs={killed}", *command, timeout=3600).returncode == 0
    two = run_py(f"paths.outputs={parallel}", *command, "evaluation.processes=2", timeout=3600)
    assert two.returncode == 0

    def told(outputs: Path) -> tuple[dict[str, bytes], str]:
        results = json.loads((only_folder(outputs) / "results.json").read_text())
        for attack in results["attacks"].values():
            del attack["seconds"]
        rows = {}
        for path in only_folder(outputs).glob("evaluation/**/*.npz"):
            with np.load(path) as file:
                rows |= {
                    f"{path.parent.name}/{path.name}/{c}": file[c].tobytes()
                    for c in file.files
                    if c not in ("seconds", "checksum")
                }
        return rows, json.dumps([results[part] for part in ("attacks", "worst_case", "masking")])

    assert told(calm) == told(killed) == told(parallel)


def test_transfer_matrix_has_every_pair_of_runs(tmp_path: Path, finished: Path) -> None:
    from kwta_exp.plan import Plan, plan_to_judge
    from kwta_exp.transfer_matrix import matrix, names, overrides_for, text

    outputs = tmp_path / "relu"
    assert (
        run_py_forked(
            f"paths.outputs={outputs}", *TINY[:5], *TINY[-2:], "activation=relu", "suite=none"
        ).returncode
        == 0
    )
    folders = [only_folder(finished), only_folder(outputs)]

    def plans(attack: str) -> dict[str, Plan]:
        overrides = overrides_for(attack, 0.1)
        return {name: plan_to_judge(path, overrides, None, False) for name, path in names(folders).items()}

    pgd, work = plans("pgd"), tmp_path / "work"
    found = matrix(pgd, 30, 0, work)
    robust = found["robust"]
    (kwta, relu) = robust
    assert "kwta0.1" in kwta
    assert "relu" in relu
    assert robust[relu][relu] < robust[relu][kwta] <= robust[relu]["clean"]
    assert matrix(pgd, 30, 0, work) == found
    assert matrix(dict(reversed(pgd.items())), 30, 0, work)["robust"] == robust
    assert len(text(found).splitlines()) == 7
    bpda = matrix(plans("bpda"), 30, 0, work)
    assert relu not in bpda["robust"][kwta]  # BPDA is not applicable to the ReLU network
    assert "n/a" in text(bpda)
    with pytest.raises(UserError, match="given twice"):
        names([folders[0], folders[0]])
