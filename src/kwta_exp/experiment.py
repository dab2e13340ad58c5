"""The story of a run: seed, data, model, fit, evaluate, report."""

import json
import logging
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kwta_exp import environment
from kwta_exp.config import (
    Settings,
    adopt_run,
    build,
    call,
    choices,
    explain,
    local_code,
    overrides,
    plain,
    run_name,
    settings,
    user_errors,
    with_facts,
)
from kwta_exp.data.datasets import Dataset, Images
from kwta_exp.errors import UserError
from kwta_exp.run_folder import RunFolder, read_results, readable
from kwta_exp.runtime import Runtime
from kwta_exp.storage import sha256_of_file, write_json, write_text

# torch takes seconds to load, so it is imported where the work begins: a finished run or a wrong
# path is reported before that.
if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from kwta_exp.attacks import Attack, Threat
    from kwta_exp.training import Training

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float:
    """Do what ``cfg`` says, unless it is done already.

    Returns:
        The robust accuracy left in the worst case, or the clean accuracy where nothing attacked.

    Raises:
        ConfigError: for anything the user can put right, as one message.
    """
    try:
        with user_errors():
            plan = Plan.of(cfg)
            results = plan.finished_results()
            if results is None:
                results = _carry_out(plan)
    except KeyboardInterrupt:
        log.warning("interrupted; the same command continues")
        raise
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            log.error("FAILED %s: %s", " ".join(overrides()), error)  # noqa: TRY400
        raise
    return float(
        (results["worst_case"] or results["clean"]).get("robust_accuracy", results["clean"]["accuracy"])
    )


@dataclass(frozen=True)
class Plan:
    """What will be run and where, settled without loading torch."""

    cfg: DictConfig
    chosen: dict[str, str]
    options: Settings
    runtime: Runtime
    dataset: Dataset
    weights: Path | None
    name: str
    folder: RunFolder

    @classmethod
    def of(cls, cfg: DictConfig) -> "Plan":
        chosen, options = choices(), settings(cfg)
        weights = _weights_file(options.weights)
        trains = chosen["training"] != "none"
        if not trains:
            if weights is None:
                raise UserError(
                    "weights=null: training=none needs something to judge;"
                    " expected a checkpoint file or a run folder"
                )
            if source := _source_run(weights):
                adopt_run(cfg, chosen, source, overrides())

        runtime, dataset = build(cfg, "runtime"), build(cfg, "dataset")
        nodes = ("model", "training", "optimizer", "lr_schedule") if trains else ("model",)
        elsewhere = ("root", "path", "download")  # where the data lie decides nothing
        decisive = {node: plain(cfg, node) for node in nodes}
        identity = {
            "seed": options.seed,
            "dataset": {k: v for k, v in plain(cfg, "dataset").items() if k not in elsewhere},
            "content": dataset.fingerprint(),
            "weights": weights and sha256_of_file(weights),
            "runtime": runtime.identity(),
            "code": local_code(decisive),
            **decisive,
        }
        name = run_name(cfg, chosen)
        folder = RunFolder.of(Path(options.paths.outputs), name, options.seed, identity)
        return cls(cfg, chosen, options, runtime, dataset, weights, name, folder)

    @property
    def trains(self) -> bool:
        return self.chosen["training"] != "none"

    @property
    def judged_weights(self) -> Path | None:
        """The file whose weights are evaluated, once it exists."""
        if not self.trains:
            return self.weights
        return self.folder.best if self.folder.last.exists() else None

    def evaluation_identity(self, weights: Path) -> dict[str, Any]:
        """Everything that decides the outcome of each image, beside the run's own identity."""
        attacks = plain(self.cfg, "attack")
        return {
            "attacks": list(attacks.items()),  # their order counts
            "code": local_code(attacks),
            "threat": plain(self.cfg, "threat"),
            "n": self.options.evaluation.n,
            "batch_size": self.options.evaluation.batch_size,
            "weights": sha256_of_file(weights),
        }

    def evaluation_folder(self, weights: Path) -> Path:
        """Named by the evaluation's identity."""
        return self.folder.evaluation(readable(self.chosen["suite"]), self.evaluation_identity(weights))

    @property
    def command(self) -> str:
        """The command line that does this; in a multirun, this job's share of it."""
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return shlex.join(["python", "run.py", *overrides()])
        return environment.command()

    def finished_results(self) -> dict[str, Any] | None:
        """What an earlier run of the same plan left, if it came to its end and is wanted."""
        if self.options.rerun or self.judged_weights is None:
            return None
        results = read_results(self.evaluation_folder(self.judged_weights) / "results.json")
        if results is not None:
            log.info("already finished: %s", self.folder.path)
            _compare_commits(results["run"].get("commit"))
        return results


def _compare_commits(then: str | None) -> None:
    now = environment.commit()
    if then != now:
        log.info("(by commit %s; the source is at %s now; rerun=true runs it anew)", then, now)


def _carry_out(plan: Plan) -> dict[str, Any]:
    """Build everything, make the folder, then train, attack and report."""
    options = plan.options
    parts = _build_parts(plan)
    fabric = plan.runtime.launch()

    from kwta_exp.data.batches import first_test_images
    from kwta_exp.evaluation import evaluate, plain_gradient_attacks, summarise
    from kwta_exp.report.terminal import results_table

    with _opened(plan, str(fabric.device)):
        if plan.trains and not plan.folder.last.exists():
            _train(plan, parts, fabric)

        network, weights = parts.network, plan.judged_weights
        assert weights is not None
        _load(network, weights)
        network.to(device=fabric.device)

        images = first_test_images(parts.images, options.evaluation.n, fabric.device)
        folder = plan.evaluation_folder(weights)
        write_json(
            folder / "evaluation.json",
            {
                "identity": plan.evaluation_identity(weights),
                "environment": environment.describe(plan.command, str(fabric.device), plan.runtime.identity()),
            },
        )
        batch_size = options.evaluation.batch_size
        clean, attacks, inapplicable = evaluate(
            network, images, parts.suite, parts.threat, options.seed, batch_size, folder
        )

        details = {
            name: attack.details(network) for name, attack in parts.suite.items() if hasattr(attack, "details")
        }
        card, plain_names = _identity_card(plan, weights), plain_gradient_attacks(parts.suite)
        results = summarise(card, parts.threat, clean, attacks, inapplicable, details, plain_names)
        write_json(plan.folder.results, results)
        write_json(folder / "results.json", results)  # the last: it says that all is done
        log.info("%s\n\nEverything is in %s", results_table(results), plan.folder.path)

    return results


@dataclass(frozen=True)
class _Parts:
    """All that is cheap to build, built and tried before anything is written."""

    training: "Training | None"
    optimizer: "Callable[..., Any] | None"
    lr_schedule: "Callable[..., Any] | None"
    threat: "Threat"
    suite: "dict[str, Attack]"
    images: Images
    network: "nn.Module"


def _build_parts(plan: Plan) -> _Parts:
    import torch

    from kwta_exp.attacks import FoolboxAttack
    from kwta_exp.checkpoint import load_into, read_weights
    from kwta_exp.randomness import key

    cfg = plan.cfg
    call(cfg, "activation", build(cfg, "activation"))  # so that its errors name it, not the model

    threat = build(cfg, "threat")
    suite = {name: build(cfg, f"attack.{name}") for name in cfg.attack}
    for name, attack in suite.items():
        if type(attack).__module__.startswith("foolbox."):
            suite[name] = FoolboxAttack(attack, threat)
        elif not callable(attack):
            raise UserError(f"attack.{name}: {attack!r} cannot be called; expected an attack")

    training = build(cfg, "training") if plan.trains else None
    images = plan.dataset.load()
    facts = {
        "num_classes": images.num_classes,
        "in_channels": images.in_channels,
        "image_size": images.image_size,
    }
    factory = build(cfg, "model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(plan.options.seed, "weights"))
        network = call(cfg, "model", factory, **with_facts(factory, facts))
    if plan.weights:
        load_into(network, read_weights(plan.weights), str(plan.weights))
    _try_out(network, cfg, images)

    optimizer = lr_schedule = None
    if plan.trains:
        optimizer, lr_schedule = build(cfg, "optimizer"), build(cfg, "lr_schedule")
        trial = call(cfg, "optimizer", optimizer, [torch.nn.Parameter(torch.zeros(1))])
        trial_schedule = call(cfg, "lr_schedule", lr_schedule, trial)
        call(cfg, "optimizer", trial.step)
        call(cfg, "lr_schedule", trial_schedule.step)  # some look at their settings only now

    return _Parts(training, optimizer, lr_schedule, threat, suite, images, network)


def _try_out(network: "nn.Module", cfg: DictConfig, images: Images) -> None:
    """Send two images through the network: its layers must fit each other, the data and the classes."""
    import torch

    from kwta_exp.data.batches import to_float

    network.eval()
    try:
        with torch.no_grad():
            logits = network(to_float(torch.from_numpy(images.x_train[:2])))
    except (RuntimeError, ValueError, TypeError) as error:
        named = [name for name in plain(cfg, "activation") if f"{name}=" in str(error)]
        where = "activation" if named else "model"
        raise UserError(explain(error, cfg, where)) from error
    expected = (len(images.x_train[:2]), images.num_classes)
    if tuple(logits.shape) != expected:
        raise UserError(f"model: returns {tuple(logits.shape)} for two images; expected logits {expected}")


def _train(plan: Plan, parts: _Parts, fabric: Any) -> None:
    """Fit the network and write its best and last weights."""
    from kwta_exp.checkpoint import save_weights
    from kwta_exp.data.batches import TrainingBatches, split_training
    from kwta_exp.training.fit import fit

    seed, dataset, training = plan.options.seed, plan.dataset, parts.training
    assert training
    assert parts.optimizer
    assert parts.lr_schedule
    train, val = split_training(parts.images, dataset.val_fraction, seed, fabric.device)
    batches = TrainingBatches(train, training.batch_size, dataset.crop_padding, dataset.flip, seed)
    log.info(
        "training %s on %d images (%d held out) for %d epochs on %s",
        plan.name, len(train), len(val), training.epochs, fabric.device,
    )  # fmt: skip

    def on_epoch(history: list[dict[str, float]]) -> None:
        write_text(plan.folder.metrics, "".join(json.dumps(record) + "\n" for record in history))
        log.info("%s", _epoch_line(history[-1], training.epochs) if history else "starting")

    fitted = fit(
        parts.network, training, batches, val, parts.optimizer, parts.lr_schedule, fabric,
        plan.folder.state, on_epoch,
    )  # fmt: skip

    save_weights(plan.folder.best, fitted.best, {"epoch": str(fitted.best_epoch)})
    save_weights(plan.folder.last, fitted.last, {"epoch": str(training.epochs)})
    log.info("best epoch: %d", fitted.best_epoch)


def _epoch_line(record: Mapping[str, float], epochs: int) -> str:
    robust = record.get("val_robust_accuracy")
    return (
        f"epoch {record['epoch']}/{epochs}: loss {record['loss']:.4f}, accuracy {record['accuracy']:.1%},"
        f" validation {record['val_accuracy']:.1%}"
        + (f" (attacked {robust:.1%})" if robust is not None else "")
        + f", {record['images_per_second']:,.0f} images/s"
    )


def _load(network: "nn.Module", weights: Path) -> None:
    from kwta_exp.checkpoint import load_into, read_weights

    load_into(network, read_weights(weights), str(weights))


def _identity_card(plan: Plan, weights: Path) -> dict[str, Any]:
    """Who these results are of: the ``run`` part of ``results.json``."""
    groups = ("dataset", "model", "activation", "training", "suite")
    return {
        "name": plan.name,
        "folder": plan.folder.path.name,
        "seed": plan.options.seed,
        **{group: plan.chosen[group] for group in groups},
        "weights_sha256": sha256_of_file(weights),
        "command": plan.command,
        "commit": environment.commit(),
    }


def _weights_file(weights: str | None) -> Path | None:
    """The checkpoint that ``weights=`` names: a file, or the best weights of a finished run."""
    if weights is None:
        return None
    path = Path(weights)
    if path.is_dir():
        folder = RunFolder(path)
        if not folder.last.exists():
            raise UserError(
                f"weights={weights}: no finished training there; expected a run folder with {folder.last}"
            )
        return folder.best
    if not path.is_file():
        raise UserError(f"weights={weights}: no such file or folder; expected a checkpoint or a run folder")
    return path


def _source_run(weights: Path) -> Path | None:
    """The run folder that a checkpoint lies in, if it does."""
    folder = RunFolder(weights.parent.parent)
    return folder.path if weights in (folder.best, folder.last) and folder.config.exists() else None


@contextmanager
def _opened(plan: Plan, device: str) -> Iterator[None]:
    """The run's folder, made, described, locked against a second process, and logging to its file."""
    folder = plan.folder
    try:
        folder.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.lock, timeout=0).acquire()
    except Timeout as error:
        raise UserError(f"{folder.path}: another process is running this very experiment") from error
    except OSError as error:
        raise UserError(f"paths.outputs: cannot write {folder.path}: {error.strerror}") from error
    with lock:
        if plan.options.rerun and (aside := folder.set_aside()):
            log.info("rerun: the earlier results are kept in %s", aside)
        folder.remove_partial_files()
        # Once: these tell how the weights came about. Each evaluation has an evaluation.json.
        if folder.environment.exists():
            _compare_commits(json.loads(folder.environment.read_text()).get("commit"))
        else:
            write_text(folder.config, OmegaConf.to_yaml(plan.cfg))
            recorded = {"overrides": overrides(), "choices": plan.chosen}
            write_text(folder.overrides, OmegaConf.to_yaml(OmegaConf.create(recorded)))
            described = environment.describe(plan.command, device, plan.runtime.identity())
            write_json(folder.environment, described)

        handler = logging.FileHandler(folder.log, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        file_only = logging.getLogger("kwta_exp.file_only")
        file_only.propagate = False
        for logger in (logging.getLogger(), file_only):
            logger.addHandler(handler)
        logging.captureWarnings(True)
        try:
            file_only.info("%s", plan.command)
            yield
        except BaseException:
            file_only.exception("stopped")
            raise
        finally:
            logging.captureWarnings(False)
            for logger in (logging.getLogger(), file_only):
                logger.removeHandler(handler)
            handler.close()
