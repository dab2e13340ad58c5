"""The story of a run: plan, parts, fit, evaluate, report."""

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kwta_exp import environment
from kwta_exp.config import CommandLine, Config, ConfigError, plain, user_errors, yaml_of
from kwta_exp.errors import UserError, shortened
from kwta_exp.plan import Plan
from kwta_exp.results_file import evaluation_info
from kwta_exp.run_folder import opened, set_changed_aside
from kwta_exp.storage import trained_ratio, write_json, write_lines

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from kwta_exp.parts import Parts

log = logging.getLogger(__name__)


def run(cfg: Config) -> float:
    """Do what ``cfg`` says, unless it is done already.

    Returns:
        The robust accuracy left in the worst case, or the clean accuracy where nothing attacked.

    Raises:
        ConfigError: for anything the user can put right, as one message.
    """
    line = CommandLine.current()
    try:
        with user_errors():
            plan = Plan.of(cfg, line)
            results = plan.finished_results()
            if results is None:
                results = _carry_out(plan)
            else:
                plan.report_finished(results)
    except Exception as error:
        if line.multirun:
            log.error("FAILED %s: %s", shortened(" ".join(line.overrides)), error)  # noqa: TRY400
        if isinstance(error, UserError):
            raise ConfigError(shortened(str(error))) from error
        raise
    return float(
        (results["worst_case"] or results["clean"]).get("robust_accuracy", results["clean"]["accuracy"])
    )


def _carry_out(plan: Plan) -> dict[str, Any]:
    """Build everything, make the folder, then train, attack and report."""
    # torch takes seconds to load, so it is imported here: a finished run or a wrong path never waits.
    from kwta_exp.parts import build_parts

    options = plan.options
    parts = build_parts(plan)
    fabric = plan.runtime.launch()

    import torch

    from kwta_exp.audit import Evaluation
    from kwta_exp.checkpoint import load_into, read_weights
    from kwta_exp.data.batches import first_test_images
    from kwta_exp.report.terminal import results_table
    from kwta_exp.training.sparsity import set_ratio

    described = environment.describe(plan.command, str(fabric.device), plan.runtime.identity())
    with opened(plan.folder, _texts(plan), described, options.rerun):
        plan.folder.set_damaged_aside()
        if not plan.folder.trained:
            if plan.trains:
                _train(plan, parts, fabric)
            else:
                _adopt_weights(plan, parts)
        elif plan.trains and not plan.folder.metrics.exists():
            _write_metrics_again(plan)

        network, weights = parts.network, plan.judged_weights
        assert weights is not None
        load_into(network, read_weights(weights), str(weights))
        if plan.trains and (ratio := trained_ratio(weights)):  # else the configuration has it
            set_ratio(network, ratio)
        network.to(memory_format=torch.contiguous_format).to(device=fabric.device)

        images = first_test_images(parts.images, options.evaluation.n, fabric.device)
        folder = plan.evaluation_folder(weights)
        set_changed_aside(folder)
        identity = plan.evaluation_identity(weights)
        write_json(folder / "evaluation.json", {"identity": identity, "environment": described})
        evaluation = Evaluation(
            network, images, parts.suite, parts.threat, options.evaluation, options.seed, folder
        )
        results = evaluation.results(plan.run_info(weights))
        results["evaluation"] = evaluation_info(folder)
        write_json(plan.folder.results, results)
        write_json(folder / "results.json", results)  # the last: it says that all is done
        log.info("%s\n\nEverything is in %s", results_table(results), folder)

    return results


def _adopt_weights(plan: Plan, parts: "Parts") -> None:
    """Keep the weights that are only judged, so that the folder is a run like any other."""
    from kwta_exp.checkpoint import save_weights, weights_of

    for path in (plan.folder.best, plan.folder.last):
        save_weights(path, weights_of(parts.network), _about(plan))


def _about(plan: Plan) -> dict[str, str]:
    """What a checkpoint says of the network whose weights it holds."""
    return {"activation": json.dumps(plain(plan.cfg, "activation"))}


def _train(plan: Plan, parts: "Parts", fabric: "Fabric") -> None:
    """Fit the network and write its best and last weights."""
    import torch

    from kwta_exp.checkpoint import save_weights
    from kwta_exp.data.batches import TrainingBatches, split_training
    from kwta_exp.training.fit import fit

    seed, dataset, training = plan.options.seed, plan.dataset, parts.training
    assert training
    assert parts.optimizer
    assert parts.lr_schedule
    assert parts.sparsity
    if plan.runtime.channels_last:
        parts.network.to(memory_format=torch.channels_last)
    train, val = split_training(parts.images, dataset.train_n, dataset.val_fraction, seed, fabric.device)
    batches = TrainingBatches(train, training.batch_size, dataset.crop_padding, dataset.flip, seed)
    log.info(
        "training %s on %d images (%d held out) for %d epochs on %s",
        plan.name, len(train), len(val), training.epochs, fabric.device,
    )  # fmt: skip

    def on_epoch(history: list[dict[str, float]]) -> None:
        write_lines(plan.folder.metrics, history)
        log.info("%s", _epoch_line(history[-1], training.epochs) if history else "starting")

    fitted = fit(
        parts.network, training, batches, val, parts.optimizer, parts.lr_schedule, parts.sparsity, fabric,
        plan.folder.state, on_epoch, compiled=plan.runtime.compile,
    )  # fmt: skip

    about = _about(plan)
    if fitted.sparsity_ratio is not None:
        about["sparsity_ratio"] = repr(fitted.sparsity_ratio)
    save_weights(plan.folder.best, fitted.best, {"epoch": str(fitted.best_epoch), **about})
    save_weights(plan.folder.last, fitted.last, {"epoch": str(training.epochs), **about})
    log.info("best epoch: %d", fitted.best_epoch)


def _write_metrics_again(plan: Plan) -> None:
    """Write the records of training that were lost from its state, if that is whole."""
    from kwta_exp.checkpoint import read_state

    try:
        write_lines(plan.folder.metrics, read_state(plan.folder.state, {"history"})["history"])
    except UserError as error:
        log.warning("the records of training are lost: %s", error)


def _epoch_line(record: Mapping[str, Any], epochs: int) -> str:
    robust = record.get("val_robust_accuracy")
    return (
        f"epoch {record['epoch']}/{epochs}: loss {record['loss']:.4f}, accuracy {record['accuracy']:.1%},"
        f" validation {record['val_accuracy']:.1%}"
        + (f" (attacked {robust:.1%})" if robust is not None else "")
        + (f", ratio {record['sparsity_ratio']:g}" if "sparsity_ratio" in record else "")
        + f", {record['images_per_second']:,.0f} images/s"
    )


def _texts(plan: Plan) -> dict[str, str]:
    """The files that tell, beside ``environment.json``, how the weights came about."""
    recorded = {"overrides": plan.line.overrides, "choices": plan.chosen}
    return {"config.yaml": yaml_of(plan.cfg), "overrides.yaml": yaml_of(recorded)}
