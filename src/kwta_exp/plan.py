"""What will be run and where: settled without loading torch, so that a finished run is known at once."""

import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kwta_exp import environment
from kwta_exp.config import (
    CommandLine,
    Config,
    adopt_ratio,
    adopt_run,
    build,
    composed,
    plain,
    read_fractions,
    recorded_network,
    run_name,
    settings,
)
from kwta_exp.data.datasets import Dataset, Synthetic, synthetic_like
from kwta_exp.data.image_folder import ImageFolder
from kwta_exp.download import fetch, is_url
from kwta_exp.errors import UserError
from kwta_exp.received import regular_size
from kwta_exp.recorded import PLACES, RecordedRun
from kwta_exp.results_file import read_results
from kwta_exp.run_folder import RunFolder, compare_commits, finished_evaluation, is_described, readable
from kwta_exp.runtime import Runtime
from kwta_exp.scale import SCALED, apply_scale
from kwta_exp.settings import Settings
from kwta_exp.storage import held, read_metadata, sha256_of_file, trained_ratio, write_json
from kwta_exp.trust import local_code

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What will be run and where, settled without loading torch."""

    cfg: Config
    line: CommandLine
    chosen: dict[str, str]
    options: Settings
    scale: str
    runtime: Runtime
    dataset: Dataset
    weights: Path | None
    name: str
    folder: RunFolder

    @classmethod
    def of(cls, cfg: Config, line: CommandLine) -> "Plan":
        line.require_choices()
        chosen, options = dict(line.choices), settings(cfg)
        weights = _weights_file(options.weights, options.weights_sha256, Path(options.paths.data))
        # A checkpoint decides the size of the network; only a tiny run's is a tiny one.
        sized = [node for node in SCALED if node != "model" or weights is None or _is_tiny(weights)]
        scale = apply_scale(cfg, sized)
        options = settings(cfg)
        trains = chosen["training"] != "none"
        if not trains:
            if weights is None:
                raise UserError(
                    "weights=null: training=none needs something to judge;"
                    " expected a checkpoint file or a run folder"
                )
            if source := _source_run(weights):
                adopt_run(cfg, chosen, RecordedRun.read(source, "weights"), line.overrides)
                apply_scale(cfg, sized)
            if ratio := trained_ratio(weights):
                adopt_ratio(cfg, ratio, line.overrides)

        if weights is not None:
            _check_activation(weights, plain(cfg, "activation"), trains)
        read_fractions(cfg)
        runtime, dataset = build(cfg, "runtime", Runtime), build(cfg, "dataset", Dataset)
        if scale != "full" and _replaceable(dataset, line.overrides):
            dataset = synthetic_like(dataset)
            log.info("scale=%s: %s is absent; %s is used instead", scale, chosen["dataset"], dataset)
        nodes = ("model", "training", "optimizer", "lr_schedule", "sparsity") if trains else ("model",)
        decisive = {node: plain(cfg, node) for node in nodes}
        if decisive.get("training", {}).get("search") == "exact":
            del decisive["training"]["search"]  # runs older than the choice keep their names
        identity = {
            "seed": options.seed,
            "dataset": {k: v for k, v in plain(cfg, "dataset").items() if k not in PLACES},
            "content": dataset.fingerprint(),
            "weights": weights and sha256_of_file(weights),
            "runtime": runtime.identity(),
            "code": local_code(decisive),
            **decisive,
        }
        name = run_name(cfg, chosen, scale)
        folder = RunFolder.of(Path(options.paths.outputs), name, options.seed, identity)
        return cls(cfg, line, chosen, options, scale, runtime, dataset, weights, name, folder)

    @property
    def trains(self) -> bool:
        return self.chosen["training"] != "none"

    @property
    def judged_weights(self) -> Path | None:
        """The file whose weights are evaluated, once it exists."""
        return self.folder.best if self.folder.trained else None

    def evaluation_identity(self, weights: Path) -> dict[str, Any]:
        """Everything that decides the outcome of each image, beside the run's own identity."""
        attacks = plain(self.cfg, "attack")
        for name, attack in attacks.items():
            if (
                isinstance(attack, dict) and attack.get("source") is not None
            ):  # of a transferred attack: what counts is its weights
                attack["source"] = sha256_of_file(source_weights(attack["source"], f"attack.{name}.source"))
        search = self.options.evaluation.search
        return {
            **({} if search == "exact" else {"search": search}),
            "attacks": list(attacks.items()),  # their order counts
            "code": local_code(attacks),
            "threat": plain(self.cfg, "threat"),
            "n": self.options.evaluation.n,
            "diagnostic_n": self.options.evaluation.diagnostic_n,
            "save_images": self.options.evaluation.save_images,
            "checks_n": self.options.evaluation.checks_n,
            "budget": self.options.evaluation.budget,
            "batch_size": self.options.evaluation.batch_size,
            "weights": sha256_of_file(weights),
        }

    def evaluation_folder(self, weights: Path) -> Path:
        """Named by the evaluation's identity."""
        return self.folder.evaluation(readable(self.chosen["suite"]), self.evaluation_identity(weights))

    @property
    def command(self) -> str:
        """The command line that does this; in a multirun, this job's share of it."""
        if self.line.multirun:
            return shlex.join([*environment.program(), *self.line.overrides])
        return environment.command()

    def finished_results(self) -> dict[str, Any] | None:
        """What an earlier run of the same plan left, if it came to its end, is wanted, and is all there."""
        weights = None if self.options.rerun else self.judged_weights
        if weights is None or not is_described(self.folder.path) or self.folder.metrics_damaged:
            return None
        return finished_evaluation(self.evaluation_folder(weights))

    def finish_again(self, results: Mapping[str, Any]) -> None:
        """Say what the finished ``results`` are, and make them the run's latest, whatever ran in between."""
        from kwta_exp.report.terminal import results_table

        if not _is_latest(results, self.folder.results):
            with held(self.folder.path):
                write_json(self.folder.results, results)
        evaluation = self.folder.path / "evaluation" / results["evaluation"]["name"]
        log.info("already finished\n%s\n\nEverything is in %s", results_table(results), evaluation)
        compare_commits(results["run"]["commit"])

    def identity_card(self, weights: Path) -> dict[str, Any]:
        """Who these results are of: the ``run`` part of ``results.json``."""
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


def _replaceable(dataset: Dataset, given: Sequence[str]) -> bool:
    """Whether images that are absent may be made up, to try a command out: not where the user says they are."""
    named = any(override.lstrip("+").startswith("dataset.root=") for override in given)
    usual_place = isinstance(dataset, ImageFolder) and not named
    return (dataset.downloadable or usual_place) and not dataset.present()


def _is_latest(results: Mapping[str, Any], path: Path) -> bool:
    try:
        return read_results(path) == results
    except UserError:  # damaged: it is a copy
        return False


def _weights_file(weights: str | None, sha256: str | None, data: Path) -> Path | None:
    """The checkpoint that ``weights=`` names: a file, a URL, or the best weights of a finished run."""
    if weights is None:
        return None
    path = fetch(weights, sha256, data / "weights") if is_url(weights) else Path(weights)
    if os.path.isdir(path):  # unlike Path.is_dir, for names that are too long as well  # noqa: PTH112
        folder = RunFolder(path)
        if not folder.last.exists():
            raise UserError(
                f"weights={weights}: no finished training there; expected a run folder with {folder.last}"
            )
        path = folder.best
    try:
        regular_size(path)
    except ValueError as error:
        raise UserError(f"weights={weights}: {error}; expected a checkpoint or a run folder") from error
    if sha256 is not None and sha256_of_file(path) != sha256:
        raise UserError(f"weights_sha256={sha256}: {weights} has SHA-256 {sha256_of_file(path)}")
    return path


def plan_to_judge(run: Path, overrides: Sequence[str], config_dir: Path | None, trust: bool) -> Plan:
    """The plan of ``training=none weights=RUN OVERRIDES``, for tools that judge a run again.

    Args:
        run: a finished run's folder.
        overrides: as ``run.py`` takes them; a group chosen here is not taken from the folder.
        config_dir: a folder of the user's own options.
        trust: believe the folder whole, classes and paths included.

    Raises:
        UserError: for a folder without a finished training, or one that names what is not believed.
    """
    given = ["training=none", *overrides]
    cfg, line = composed(given, config_dir)
    cfg.weights, cfg.trust = str(run), trust
    return Plan.of(cfg, line)


def source_weights(run: str, key: str) -> Path:
    """The best weights of a finished run."""
    folder = RunFolder(Path(run))
    if not folder.last.exists() or not folder.config.exists():
        raise UserError(f"{key}={run}: no finished training there; expected a run folder with {folder.last}")
    return folder.best


def _check_activation(weights: Path, activation: Mapping[str, Any], trains: bool) -> None:
    """Weights fit a network with another activation, which computes something else.

    A run's weights say which activation they are of. To train on with another one is a method; to judge
    with it is a mistake, unless it is the same one with other values.
    """
    try:
        theirs = json.loads(read_metadata(weights).get("activation", "null"))
    except (ValueError, RecursionError):
        return  # a file of somebody else's
    if not isinstance(theirs, dict) or "_target_" not in theirs:
        return
    target, given = str(theirs["_target_"]), activation.get("_target_")
    if target != given and not trains:
        raise UserError(
            f"activation._target_={given}: {weights} was trained with {target}, and would fit a network that"
            " computes something else; expected the same activation, or training=... to train on with this one"
        )
    ignored = {"ratio"}  # the weights have it themselves
    other = {
        name: (theirs.get(name), activation.get(name))
        for name in sorted((theirs.keys() | activation.keys()) - ignored)
        if theirs.get(name) != activation.get(name)
    }
    if other:
        log.warning(
            "weights=%s: trained with another activation than this network has: %s", weights,
            ", ".join(f"{name}={was}, here {here}" for name, (was, here) in other.items()),
        )  # fmt: skip


def source_network(run: str, key: str, trust: bool) -> tuple[Path, Config]:
    """The best weights of a finished run, and the configuration of its network, to be built."""
    weights = source_weights(run, key)
    return weights, recorded_network(RecordedRun.read(Path(run), key), trust)


def _is_tiny(weights: Path) -> bool:
    """Whether a checkpoint is of a run at another scale than full."""
    source = _source_run(weights)
    return source is not None and source.parent.name.startswith("tiny-")


def _source_run(weights: Path) -> Path | None:
    """The run folder that a checkpoint lies in, if it does."""
    folder = RunFolder(weights.parent.parent)
    return folder.path if weights in (folder.best, folder.last) and folder.config.exists() else None
