"""One run in several processes, one for each device, through Fabric's DDP."""

import ctypes
import datetime
import logging
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kwta_exp.errors import UserError
from kwta_exp.shell import JobFormatter

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from kwta_exp.plan import Plan

PATIENCE = datetime.timedelta(days=30)
"""Processes wait for each other as long as the first makes checks; one that dies ends all at once."""

_PR_SET_PDEATHSIG = 1


def in_processes(plan: "Plan", function: "Callable[[Fabric, Plan], object]") -> None:
    """Call ``function(fabric, plan)`` in ``plan.runtime.devices`` processes. What it finds, it writes to files.

    They are started with "spawn": a fork would inherit locks of threads that it does not have. If one dies, all
    end.

    Args:
        plan: of the run; each process builds its own parts from it.
        function: of a module, so that it can be pickled.

    Raises:
        UserError: that a process raised, or if one died.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

    with tempfile.TemporaryDirectory() as folder:
        try:
            in_one: Any = _in_one
            # Pickled here, since Fabric looks into dataclasses and refuses frozen ones.
            plan.runtime.fabric(PATIENCE).launch(in_one, pickle.dumps((plan, function)), folder)
        except ProcessRaisedException as error:
            said = [path.read_text() for path in sorted(Path(folder).iterdir())]
            if said:
                raise UserError(said[0]) from error
            raise
        except ProcessExitedException as error:
            raise UserError(
                f"runtime.devices={plan.runtime.devices}: process {error.error_index} died ({error}); the same"
                " command continues"
            ) from error


def _in_one(fabric: "Fabric", task: bytes, folder: str) -> None:
    from torch.distributed import destroy_process_group

    plan, function = pickle.loads(task)
    _end_with_parent()
    _log_in_first(fabric, plan)
    plan.runtime.prepare()
    try:
        function(fabric, plan)  # its result does not fit through the pipe that Fabric returns it by
        fabric.barrier()
        destroy_process_group()  # else the connections break as the first process to end takes them down
    except UserError as error:
        Path(folder, f"{fabric.global_rank:05d}").write_text(str(error))
        raise


def _end_with_parent() -> None:
    """On Linux, be killed when the parent dies: nobody would wait for the result."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _log_in_first(fabric: "Fabric", plan: "Plan") -> None:
    """Log in the first process as a run of one process does, and warnings in the others."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JobFormatter(plan.line.job))
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it draws a banner
    logging.basicConfig(handlers=[handler], level=logging.INFO if fabric.is_global_zero else logging.WARNING)
