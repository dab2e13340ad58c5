"""The story of a run: plan, parts, train, evaluate, report."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kwta_exp import attempts, environment
from kwta_exp.config import CommandLine, Config, ConfigError, plain, settings, user_errors, yaml_of
from kwta_exp.errors import UserError, shortened
from kwta_exp.gpu_slots import take_gpu
from kwta_exp.orphans import leaving_with_launcher
from kwta_exp.plan import Plan
from kwta_exp.results_file import evaluation_info, read_results
from kwta_exp.run_folder import RunFolder, opened, set_changed_aside
from kwta_exp.storage import write_json, write_lines
from kwta_exp.sweeps import SkippedError, Sweep
from kwta_exp.tracking import followed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from kwta_exp.parts import Parts
    from kwta_exp.training.trainer import Recipe, Trained

log = logging.getLogger(__name__)


def run(cfg: Config) -> float:
    """Run what ``cfg`` describes, unless it is finished already.

    Returns:
        The worst-case robust accuracy, or the clean accuracy if the suite is empty.

    Raises:
        ConfigError: for a mistake of the user, as one message.
    """
    line = CommandLine.current()
    try:
        with user_errors():
            results = _run_job(cfg, line) if line.multirun else _run(Plan.of(cfg, line))
    except Exception as error:
        if line.multirun:
            log.error("FAILED %s: %s", shortened(" ".join(line.overrides)), error)  # noqa: TRY400
        if isinstance(error, UserError):
            raise ConfigError(shortened(str(error))) from error
        raise
    return float(
        (results["worst_case"] or results["clean"]).get("robust_accuracy", results["clean"]["accuracy"])
    )


def _run(plan: Plan) -> dict[str, Any]:
    """The results: of an earlier run of the same plan, or made now."""
    results = plan.finished_results()
    if results is None:
        return _execute(plan)
    plan.report_finished(results)
    if not plan.folder.report_is_current:
        _write_report(plan.folder)
    return results


def _run_job(cfg: Config, line: CommandLine) -> dict[str, Any]:
    """One job of a grid, with a record in the grid's folder.

    Raises:
        SkippedError: if it failed too often, or another failed and ``fail_fast`` is true.
    """
    assert line.job is not None
    assert line.sweep is not None
    sweep, outputs = Sweep(line.sweep), Path(str(cfg.paths.outputs))
    if not sweep.begun:  # Hydra only warns of errors before the first job
        settings(cfg)
        raise UserError(f"{sweep.path}: the grid's folder could not be made; the warning above says why")
    in_a_worker = leaving_with_launcher() if line.shares_machine else nullcontext()
    with sweep.job(line.job, line.overrides, outputs) as job, in_a_worker:
        if cfg.fail_fast is True and (failed := sweep.failed_job()):
            raise SkippedError(f"fail_fast=true: job #{failed.number} of this grid failed; it was not started")
        if line.shares_machine:
            take_gpu(int(cfg.jobs_per_gpu))
        plan = Plan.of(cfg, line)
        job.runs_in(plan.folder.path)
        failures = [each for each in attempts.read(plan.folder.path) if each.get("ended") == "failed"]
        if len(failures) > plan.options.retries and not plan.options.rerun:
            raise SkippedError(
                f"retries={plan.options.retries}: failed {len(failures)} times, last with"
                f" {failures[-1].get('error')}; a larger retries, or rerun=true, tries again"
            )
        return _run(plan)


def _execute(plan: Plan) -> dict[str, Any]:
    """Build everything, make the folder, then train, attack and report."""
    # torch takes seconds to load, so a finished run and a wrong path never load it.
    from kwta_exp.parts import build_parts

    parts = build_parts(plan)  # a mistake is found before anything starts
    if plan.runtime.devices > 1:
        from kwta_exp.processes import in_processes

        in_processes(plan, _execute_in_one_of)
        results = read_results(plan.folder.results)
        assert results is not None
        return results
    return _execute_on(plan.runtime.launch(), plan, parts)


def _execute_in_one_of(fabric: "Fabric", plan: Plan) -> None:
    """The same in one of the run's processes."""
    from kwta_exp.parts import build_parts

    _execute_on(fabric, plan, build_parts(plan))


def _execute_on(fabric: "Fabric", plan: Plan, parts: "Parts") -> dict[str, Any]:
    """In the first of the run's processes, the results. It alone writes files; the others help."""
    import torch

    from kwta_exp.checkpoint import load_into, read_weights
    from kwta_exp.data.batches import first_test_images
    from kwta_exp.evaluation import Evaluation, Ranks, evaluate
    from kwta_exp.report.terminal import results_table

    options, first = plan.options, fabric.is_global_zero
    described = environment.describe(plan.command, str(fabric.device), plan.runtime.identity())
    with _opened(plan, described) if first else nullcontext(_no_tracker) as track:
        if first:
            plan.folder.set_damaged_aside()
        if not fabric.broadcast(plan.folder.trained):
            _write_weights(plan, parts, fabric, track)
        elif first and parts.recipe and not plan.folder.metrics.exists():
            _restore_metrics(plan)
        fabric.barrier()

        network, weights = parts.network, plan.judged_weights
        assert weights is not None
        load_into(network, read_weights(weights), str(weights))
        network.to(memory_format=torch.contiguous_format).to(device=fabric.device)

        images = first_test_images(parts.images, options.evaluation.n, fabric.device)
        folder = plan.evaluation_folder(weights)
        evaluation = Evaluation(
            network, images, parts.suite, parts.threat, folder, options.seed,
            **options.evaluation.model_dump(exclude={"n", "checks_n"}),
        )  # fmt: skip
        ranks = Ranks() if fabric.world_size > 1 else None
        if ranks and not first:
            ranks.follow(evaluation)
            return {}
        set_changed_aside(folder)
        identity = plan.evaluation_identity(weights)
        write_json(folder / "evaluation.json", {"identity": identity, "environment": described})
        results = evaluate(evaluation, plan.run_info(weights), options.evaluation.checks_n, ranks)
        if ranks:
            ranks.end()
        results["evaluation"] = evaluation_info(folder)
        write_json(plan.folder.results, results)
        write_json(folder / "results.json", results)  # last: its presence means that the run is finished
        log.info("%s\n\nEverything is in %s", results_table(results), folder)
        _write_report(plan.folder)
        track()

    return results


@contextmanager
def _opened(plan: Plan, described: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    """The run's folder, to be written; yields what logs its news in the tracker."""
    grid = plan.line.sweep.name if plan.line.sweep else None
    with (
        opened(plan.folder, _texts(plan), described, plan.options.rerun),
        followed(plan.tracking, plan.folder.path, grid) as track,
    ):
        yield track


def _no_tracker() -> None:
    """What the other processes of a run have instead."""


def _write_report(folder: RunFolder) -> None:
    from kwta_exp.draw.pages import figures_of
    from kwta_exp.report.pages import write_run_page
    from kwta_exp.report.runs import Run

    run = Run.read(folder.path)
    try:
        log.info("Report: %s", write_run_page(run, figures=figures_of(run)))
    except UserError as error:  # the results are there all the same
        log.warning("no report was written: %s", error)


def _write_weights(plan: Plan, parts: "Parts", fabric: "Fabric", track: Callable[[], None]) -> None:
    """Train, and write the best and the last weights; without training, those of the network as it is."""
    from kwta_exp.checkpoint import save_weights, weights_of

    about = {"activation": json.dumps(plain(plan.cfg, "activation"))}
    if parts.recipe is None:
        for path in (plan.folder.best, plan.folder.last) if fabric.is_global_zero else ():
            save_weights(path, weights_of(parts.network), about)
        return
    trained = _train(plan, parts, parts.recipe, fabric, track)
    if not fabric.is_global_zero:
        return
    save_weights(plan.folder.best, trained.best, {"epoch": str(trained.best_epoch), **about})
    save_weights(plan.folder.last, trained.last, {"epoch": str(len(trained.history)), **about})
    log.info("best epoch: %d", trained.best_epoch)


def _train(
    plan: Plan, parts: "Parts", recipe: "Recipe", fabric: "Fabric", track: Callable[[], None]
) -> "Trained":
    import torch

    from kwta_exp.data.batches import TrainingBatches, split_training
    from kwta_exp.training.trainer import Trainer

    seed, dataset, method = plan.options.seed, plan.dataset, recipe.method
    if plan.runtime.channels_last:
        parts.network.to(memory_format=torch.channels_last)
    train, val = split_training(parts.images, dataset.train_n, dataset.val_fraction, seed, fabric.device)
    batches = TrainingBatches(train, method.batch_size, dataset.crop_padding, dataset.flip, seed)
    trainer = Trainer(parts.network, recipe, batches, val, fabric, compiled=plan.runtime.compile)
    log.info(
        "training %s on %d images (%d held out) for %d epochs on %s",
        plan.name, len(train), len(val), method.epochs, fabric.device,
    )  # fmt: skip

    def on_epoch(history: list[dict[str, float]]) -> None:
        if not fabric.is_global_zero:
            return
        write_lines(plan.folder.metrics, history)
        log.info("%s", _epoch_line(history[-1], method.epochs) if history else "starting")
        track()

    return trainer.train(plan.folder.state, on_epoch)


def _restore_metrics(plan: Plan) -> None:
    """Write ``metrics.jsonl`` again from the training state, if that is intact."""
    from kwta_exp.checkpoint import read_state

    try:
        write_lines(plan.folder.metrics, read_state(plan.folder.state)["history"])
    except (UserError, KeyError) as error:
        log.warning("%s is lost: %s", plan.folder.metrics, error)


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
    """The files that record, with ``environment.json``, how the weights were made."""
    recorded = {"overrides": plan.line.overrides, "choices": plan.chosen}
    return {"config.yaml": yaml_of(plan.cfg), "overrides.yaml": yaml_of(recorded)}
