"""What will be run and in which folder, decided without loading torch: a finished run is found at once."""

import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kwta_exp import environment
from kwta_exp.adjust import SCALED, adopted, network_of, read_fractions, scaled, updated
from kwta_exp.config import (
    CommandLine,
    Config,
    build,
    composed,
    inputs,
    plain,
    require_threat_and_recipe,
    settings,
)
from kwta_exp.data.datasets import Dataset, Synthetic, synthetic_like
from kwta_exp.data.image_folder import ImageFolder
from kwta_exp.download import fetch, is_url
from kwta_exp.errors import UserError
from kwta_exp.naming import in_few_digits
from kwta_exp.received import regular_size
from kwta_exp.recorded import PLACES, RecordedRun
from kwta_exp.results_file import read_results
from kwta_exp.run_folder import RunFolder, compare_commits, config_is_intact, finished_evaluation, readable
from kwta_exp.runtime import Runtime
from kwta_exp.sealed import read_metadata, trained_ratio
from kwta_exp.settings import Inputs, Settings
from kwta_exp.storage import guarded, sha256_of_file, write_json
from kwta_exp.sweeps import Sweep
from kwta_exp.tracking import Tracking
from kwta_exp.trust import local_code

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What will be run and in which folder.

    Attributes:
        cfg: the configuration that everything is built from, scaled and with what a judged run lends.
        line: the command line.
        chosen: the option chosen in each group.
        options: the plain values of ``cfg``, with ``evaluation.search=auto`` resolved.
        scale: the name of the scale, ``"full"`` for a real run.
        runtime: device, precision and threads.
        tracking: where else the run is shown; no part of its identity.
        dataset: the data, not loaded.
        weights: the checkpoint to start from or to judge.
        name: of the folder that holds the runs of this configuration.
        folder: of this run.
    """

    cfg: Config
    line: CommandLine
    chosen: dict[str, str]
    options: Settings
    scale: str
    runtime: Runtime
    tracking: Tracking
    dataset: Dataset
    weights: Path | None
    name: str
    folder: RunFolder

    @classmethod
    def of(cls, cfg: Config, line: CommandLine) -> "Plan":
        """The plan of a composed configuration, which stays as it is.

        Raises:
            UserError: naming the key and value at fault.
        """
        line.require_choices()
        weights = find_weights(inputs(cfg))

        chosen = line.choices
        if not line.trains:
            if weights is None:
                raise UserError(
                    "weights=null: training=none needs a network to evaluate; expected a checkpoint file or a"
                    " run folder"
                )
            source = _run_folder_of(weights)
            run = RecordedRun.read(source, "weights") if source else None
            cfg = adopted(cfg, line, run, trained_ratio(weights))
            if run:
                chosen = chosen | {group: run.choices[group] for group in run.choices if group not in line.keys}
        if weights is not None:
            _check_activation(weights, plain(cfg, "activation"), line.trains)
        require_threat_and_recipe(cfg, chosen["dataset"], line.trains)

        # Weights decide the size of the network, so it is scaled only where they are of a scaled run.
        sized = weights is None or _is_tiny(weights)
        cfg = read_fractions(scaled(cfg, [node for node in SCALED if node != "model" or sized]))

        options, scale = settings(cfg), str(cfg.scale.name)
        tracking = build(cfg, "tracking", Tracking)
        runtime, dataset = build(cfg, "runtime", Runtime), build(cfg, "dataset", Dataset)
        if runtime.devices > 1 and options.evaluation.processes > 1:
            raise UserError(
                f"evaluation.processes={options.evaluation.processes}: with runtime.devices={runtime.devices}"
                " the processes of the run share the images; expected evaluation.processes=1"
            )
        evaluation = options.evaluation.resolved(runtime.resolved_accelerator)
        options = options.model_copy(update={"evaluation": evaluation})
        if scale != "full" and _is_replaceable(dataset, line):
            dataset = synthetic_like(dataset)
            log.info("scale=%s: %s is absent; %s is used instead", scale, chosen["dataset"], dataset)

        nodes = ("model", "training", "optimizer", "lr_schedule", "sparsity") if line.trains else ("model",)
        built = {node: plain(cfg, node) for node in nodes}
        identity = {
            "seed": options.seed,
            "dataset": {k: v for k, v in plain(cfg, "dataset").items() if k not in PLACES},
            "content": dataset.fingerprint(),
            "weights": weights and sha256_of_file(weights),
            "runtime": runtime.identity(),
            "code": local_code(built),
            **built,
        }
        name = run_name(cfg, chosen, scale)
        folder = RunFolder.of(Path(options.paths.outputs), name, options.seed, identity)
        return cls(cfg, line, chosen, options, scale, runtime, tracking, dataset, weights, name, folder)

    @property
    def trains(self) -> bool:
        return self.line.trains

    @property
    def judged_weights(self) -> Path | None:
        """The file whose weights are evaluated, once it exists."""
        return self.folder.best if self.folder.trained else None

    def evaluation_identity(self, weights: Path) -> dict[str, Any]:
        """Everything that decides the outcome of each image, beside the run's own identity."""
        attacks = plain(self.cfg, "attack")
        for name, attack in attacks.items():
            if isinstance(attack, dict) and attack.get("source") is not None:
                # A transfer attack: the weights of its source count, not their path.
                attack["source"] = sha256_of_file(source_weights(attack["source"], f"attack.{name}.source"))
        return {
            **self.options.evaluation.model_dump(exclude={"processes"}),
            "attacks": list(attacks.items()),  # their order counts
            "code": local_code(attacks),
            "threat": plain(self.cfg, "threat"),
            "weights": sha256_of_file(weights),
        }

    def evaluation_folder(self, weights: Path) -> Path:
        """The folder of the planned evaluation, named by its identity."""
        return self.folder.evaluation(readable(self.chosen["suite"]), self.evaluation_identity(weights))

    @property
    def command(self) -> str:
        """The command line of this run; in a multirun, that of this job alone."""
        if self.line.sweep is not None:
            return shlex.join([*Sweep(self.line.sweep).program, *self.line.overrides])
        return environment.command()

    def finished_results(self) -> dict[str, Any] | None:
        """The results of an earlier run of the same plan, if its files are intact and ``rerun`` is false."""
        weights = None if self.options.rerun else self.judged_weights
        if weights is None or not config_is_intact(self.folder.path) or self.folder.metrics_damaged:
            return None
        return finished_evaluation(self.evaluation_folder(weights))

    def report_finished(self, results: Mapping[str, Any]) -> None:
        """Log the finished ``results`` and make them the run's latest."""
        from kwta_exp.report.terminal import results_table

        if not _is_latest(results, self.folder.results):
            with guarded(self.folder.path):
                write_json(self.folder.results, results)
        evaluation = self.folder.path / "evaluation" / results["evaluation"]["name"]
        log.info("already finished\n%s\n\nEverything is in %s", results_table(results), evaluation)
        compare_commits(results["run"]["commit"])

    def run_info(self, weights: Path) -> dict[str, Any]:
        """The ``run`` part of ``results.json``."""
        groups = ("dataset", "model", "activation", "training", "suite")
        return {
            "name": self.name,
            "folder": self.folder.path.name,
            "seed": self.options.seed,
            "scale": self.scale,
            **({"synthetic": repr(self.dataset)} if isinstance(self.dataset, Synthetic) else {}),
            **{group: self.chosen[group] for group in groups},
            "weights_sha256": sha256_of_file(weights),
            "source_sha256": self.weights and sha256_of_file(self.weights),
            "command": self.command,
            "commit": environment.commit(),
        }


def plan_to_judge(run: Path, overrides: Sequence[str], config_dir: Path | None, trust: bool) -> Plan:
    """The plan of ``training=none weights=RUN OVERRIDES``, for tools that judge a run again.

    Args:
        run: a finished run's folder.
        overrides: as ``run.py`` takes them; a group chosen here is not taken from the folder.
        config_dir: a folder of the user's own options.
        trust: build any class and read any path that the folder names.

    Raises:
        UserError: for a folder without a finished training, or one that names what is not trusted.
    """
    cfg, line = composed(["training=none", *overrides], config_dir)
    return Plan.of(updated(cfg, {"weights": str(run), "trust": trust}), line)


def run_name(cfg: Config, chosen: Mapping[str, str], scale: str) -> str:
    """``<dataset>-<model>-<activation and its amount>-<training>``, after the scale if it is not full."""
    activation, final = plain(cfg, "activation"), plain(cfg, "sparsity.final")
    amounts = [activation.get(name) for name in ("ratio", "k", "group_size")]
    amount = "".join(in_few_digits(amount) for amount in amounts if amount is not None)
    if final is not None:
        amount += f"to{in_few_digits(final)}"
    parts = [chosen["dataset"], chosen["model"], chosen["activation"] + amount, chosen["training"]]
    return "-".join(map(readable, parts if scale == "full" else [scale, *parts]))


def find_weights(given: Inputs) -> Path | None:
    """The checkpoint that ``weights=`` names: a file, a URL, or the best weights of a finished run.

    Raises:
        UserError: if there is none, or it does not have the SHA-256 that is given.
    """
    weights, sha256 = given.weights, given.weights_sha256
    if weights is None:
        return None
    path = fetch(weights, sha256, Path(given.paths.data) / "weights") if is_url(weights) else Path(weights)
    if os.path.isdir(path):  # unlike Path.is_dir, it also accepts names that are too long  # noqa: PTH112
        path = _best_weights(RunFolder(path), f"weights={weights}")
    try:
        regular_size(path)
    except ValueError as error:
        raise UserError(f"weights={weights}: {error}; expected a checkpoint or a run folder") from error
    if sha256 is not None and sha256_of_file(path) != sha256:
        raise UserError(f"weights_sha256={sha256}: {weights} has SHA-256 {sha256_of_file(path)}")
    return path


def source_weights(run: str, key: str) -> Path:
    """The best weights of a finished run, which ``key`` names."""
    folder = RunFolder(Path(run))
    weights = _best_weights(folder, f"{key}={run}")
    if not folder.config.exists():
        raise UserError(f"{key}={run}: no config.yaml there; expected a run folder")
    return weights


def source_network(run: str, key: str, trust: bool) -> tuple[Path, Config]:
    """The best weights of a finished run, and the configuration of its network, to be built."""
    return source_weights(run, key), network_of(RecordedRun.read(Path(run), key), trust)


def _best_weights(folder: RunFolder, named: str) -> Path:
    if not folder.last.exists():
        raise UserError(f"{named}: no finished training there; expected a run folder with {folder.last}")
    return folder.best


def _run_folder_of(weights: Path) -> Path | None:
    """The run folder that a checkpoint belongs to, if there is one."""
    folder = RunFolder(weights.parent.parent)
    return folder.path if weights in (folder.best, folder.last) and folder.config.exists() else None


def _is_tiny(weights: Path) -> bool:
    """Whether a checkpoint is of a run at ``scale=tiny``."""
    folder = _run_folder_of(weights)
    return folder is not None and folder.parent.name.startswith("tiny-")


def _is_replaceable(dataset: Dataset, line: CommandLine) -> bool:
    """Whether the data is absent and may be synthetic instead: not where the user gives its path."""
    in_usual_place = isinstance(dataset, ImageFolder) and "dataset.root" not in line.keys
    return (dataset.downloadable or in_usual_place) and not dataset.present()


def _is_latest(results: Mapping[str, Any], path: Path) -> bool:
    try:
        return read_results(path) == results
    except UserError:  # damaged, but only a copy
        return False


def _check_activation(weights: Path, activation: Mapping[str, Any], trains: bool) -> None:
    """Compare the network's activation with the one that ``weights`` were trained with.

    Weights fit a network with another activation, which computes something else. To continue training with
    another activation is a method. To judge with another class is a mistake; with other values of the same
    class, it gets a warning.

    Raises:
        UserError: if nothing is trained and the classes differ.
    """
    metadata = read_metadata(weights)
    try:
        recorded = json.loads(metadata.get("activation", "null"))
    except (ValueError, RecursionError):
        return  # not a file of this project
    if not isinstance(recorded, dict) or "_target_" not in recorded:
        return
    target, given = str(recorded["_target_"]), activation.get("_target_")
    if target != given and not trains:
        raise UserError(
            f"activation._target_={given}: {weights} was trained with {target}, and would fit a network that"
            " computes something else; expected the same activation, or training=... to train on with this one"
        )
    names = (recorded.keys() | activation.keys()) - {"ratio"}  # the weights have it themselves
    different = [name for name in sorted(names) if recorded.get(name) != activation.get(name)]
    if different:
        log.warning(
            "weights=%s: trained with another activation than this network has: %s", weights,
            ", ".join(f"{name}={recorded.get(name)}, here {activation.get(name)}" for name in different),
        )  # fmt: skip
