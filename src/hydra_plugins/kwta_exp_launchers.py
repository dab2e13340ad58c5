"""The launchers of ``hydra/launcher=slurm`` and ``ray``, on top of Hydra's plugins of these kinds.

They lie here since Hydra takes launchers from ``hydra_plugins`` alone. Hydra imports this file at every start,
so it imports nothing that takes time.

The plugins raise an error at the first job that is lost (cancelled, killed, out of memory), and the other jobs'
results are lost with it. Here a lost job counts as failed, and the launcher waits for the others. What became
of a job is in the folders of the grid and of the runs; the results that a launcher returns serve only sweepers.
"""

import dataclasses
import functools
import importlib
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

log = logging.getLogger(__name__)


class _Launcher(Launcher):
    """What the launchers share: Hydra's objects, and how an outcome is read."""

    def __init__(self, **options: Any) -> None:
        self.options: dict[str, Any] = {
            key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for key, value in options.items()
        }

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config


def _announce(number: int, overrides: Sequence[str]) -> None:
    log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))


def _outcome(read: Callable[[], JobReturn], number: int, overrides: Sequence[str]) -> JobReturn:
    """What a job returned; for a lost job, a failure that says so."""
    try:
        return read()
    except Exception as error:  # the plugins' libraries raise errors of many types
        from kwta_exp.errors import UserError

        message = f"job #{number} was lost: {_cause(error)}; the same command continues it"
        log.error("%s", message)  # noqa: TRY400
        lost = JobReturn(overrides=list(overrides), status=JobStatus.FAILED)
        lost.return_value = UserError(message)
        return lost


def _cause(error: Exception) -> str:
    """One line of an error that may contain the traceback of another."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    named = [line for line in lines if "Error" in line]
    return (named or lines or [type(error).__name__])[-1]


class SlurmLauncher(_Launcher):
    """An array of SLURM jobs, submitted by submitit. ``conf/hydra/launcher/slurm.yaml`` has the options."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit the jobs and wait for all of them; raises a ``UserError`` where SLURM refuses them."""
        import submitit
        from hydra.core.singleton import Singleton
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
        from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as Plugin

        from kwta_exp.errors import UserError

        if shutil.which("sbatch") is None:
            raise UserError(
                "hydra/launcher=slurm: no sbatch on this machine; expected one that submits to a SLURM cluster"
            )
        of_all_queues = {field.name for field in dataclasses.fields(BaseQueueConf)}
        options = {key if key in of_all_queues else f"slurm_{key}": it for key, it in self.options.items()}
        folder = Path(options.pop("submitit_folder")).absolute()
        _wait_for_earlier(folder)

        executor = submitit.AutoExecutor(
            folder, cluster="slurm", slurm_max_num_timeout=options.pop("slurm_max_num_timeout")
        )
        try:
            executor.update_parameters(**options)
            numbered = list(enumerate(job_overrides, initial_job_idx))
            task = Plugin()
            task.setup(hydra_context=self.hydra_context, task_function=self.task_function, config=self.config)
            calls = [
                (list(overrides), "hydra.sweep.dir", number, str(number), Singleton.get_state())
                for number, overrides in numbered
            ]
            jobs = executor.map_array(task, *zip(*calls, strict=True))
        except (submitit.core.utils.FailedJobError, TypeError, ValueError, NameError) as error:
            raise UserError(f"hydra/launcher=slurm: {error}") from error
        for number, overrides in numbered:
            _announce(number, overrides)
        log.info(
            "submitted as SLURM job %s; Ctrl-C here leaves it running, scancel ends it; its logs are in %s",
            jobs[0].job_id.partition("_")[0], folder,
        )  # fmt: skip
        _wait_for(jobs)
        return [
            _outcome(functools.partial(_read_slurm, job), number, overrides)
            for job, (number, overrides) in zip(jobs, numbered, strict=True)
        ]


_POLL_SECONDS = 20.0
"""How often SLURM is asked about jobs that have left no result."""


def _wait_for(jobs: Sequence[Any]) -> None:
    """Wait until each job has a result, or SLURM calls it ended."""
    waiting, asked = list(jobs), time.monotonic()
    while waiting:
        time.sleep(max(1.0, len(waiting) / 100))  # each turn looks for a file of each job
        ask = time.monotonic() - asked > _POLL_SECONDS
        if ask:  # one call of sacct for all
            waiting[0].watcher.update()
            asked = time.monotonic()
        waiting = [job for job in waiting if not job.done()]


def _read_slurm(job: Any) -> JobReturn:
    """A job's result; its pickled input and result are deleted, its logs are kept."""
    if not job.paths.result_pickle.exists():
        raise RuntimeError(f"SLURM job {job.job_id}: {job.state}; its log is {job.paths.stderr}")
    result: JobReturn = job.results()[0]
    for path in (job.paths.submitted_pickle, job.paths.result_pickle):
        path.unlink(missing_ok=True)
    return result


def _wait_for_earlier(folder: Path) -> None:
    """Wait for SLURM jobs that an earlier command submitted for the same grid, and that still run or queue."""
    said = False
    while earlier := sorted(_submitted(folder) & _queued()):
        if not said:
            log.info(
                "waiting for SLURM job %s of this grid, which an earlier command submitted; scancel ends it",
                " ".join(earlier),
            )
            said = True
        time.sleep(_POLL_SECONDS)


def _submitted(folder: Path) -> set[str]:
    return {path.name.split("_")[0] for path in folder.glob("*_submitted.pkl")}


def _queued() -> set[str]:
    """The numbers of this user's jobs; of a task, its array's."""
    shown = subprocess.run(["squeue", "-h", "--me", "-o", "%F"], capture_output=True, text=True, check=False)
    return set(shown.stdout.split())


class RayLauncher(_Launcher):
    """Ray tasks, on this machine or on a running cluster.

    Args:
        ray: ``init``, what ``ray.init`` is given; ``remote``, what ``ray.remote`` is given.
    """

    def __init__(self, ray: dict[str, Any]) -> None:
        super().__init__(ray=ray)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; raises a ``UserError`` if there is no such cluster."""
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # else Ray drops lines that resemble another job's
        from hydra.core.singleton import Singleton

        from kwta_exp.errors import UserError

        ray: Any = importlib.import_module("ray")
        options = self.options["ray"]
        given = {key: value for key, value in options["init"].items() if value is not None}
        if "address" in given:
            given = {key: value for key, value in given.items() if key not in _OF_A_NEW_RAY}
        if not ray.is_initialized():
            try:
                ray.init(**given)
            except (ConnectionError, ValueError) as error:
                raise UserError(f"hydra/launcher=ray: {error}") from error
        run = ray.remote(**options["remote"])(_in_ray)

        tasks = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            _announce(number, overrides)
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = str(number), number
            tasks.append(
                run.remote(
                    hydra_context=self.hydra_context, sweep_config=config,
                    task_function=self.task_function, singleton_state=Singleton.get_state(),
                )
            )  # fmt: skip
        return [
            _outcome(functools.partial(ray.get, task), number, overrides)
            for task, (number, overrides) in zip(tasks, enumerate(job_overrides, initial_job_idx), strict=True)
        ]


_OF_A_NEW_RAY = ("num_cpus", "num_gpus", "object_store_memory", "include_dashboard")
"""Options of ``ray.init`` that a cluster which runs already refuses."""


def _in_ray(*, sweep_config: DictConfig, **arguments: Any) -> JobReturn:
    """Run a job in a worker of Ray's, in the folder that the command was given in."""
    from hydra_plugins.hydra_ray_launcher._launcher_util import _run_job

    from kwta_exp.runtime import let_idle_threads_sleep

    let_idle_threads_sleep()
    os.chdir(sweep_config.hydra.runtime.cwd)
    result: JobReturn = _run_job(sweep_config=sweep_config, **arguments)
    return result
