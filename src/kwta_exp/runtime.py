"""The device, precision, processes and threads of a run, through Lightning Fabric."""

import datetime
import inspect
import logging
import os
import shutil
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt, dataclasses

from kwta_exp import hardware
from kwta_exp.allocator import keep_freed_memory
from kwta_exp.errors import UserError
from kwta_exp.fields import STRICT

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)

Precision = Literal["32-true", "bf16-mixed"]

_CUBLAS, _WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""What makes cuBLAS deterministic, by its documentation; it is read as CUDA is initialised."""

SPINS = "8000"
"""How often an idle thread of GNU OpenMP polls for work before it sleeps."""


def let_idle_threads_sleep() -> None:
    """Make torch's idle CPU threads sleep soon, so that several processes can share the cores.

    By default they spin for milliseconds, and two processes with one thread a core each slow each other down
    tenfold or more (``benchmarks/shared.py``). Call this before torch is loaded. It does not change results. A
    user's own ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY`` is kept.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Runtime:
    """Fabric's settings, plus the number of CPU threads.

    They are checked without loading torch, so the message that a machine lacks a GPU comes at once. The values
    that they resolve to (:meth:`identity`) decide the last bits of the weights.

    Args:
        accelerator: ``"auto"`` takes an NVIDIA GPU if there is one.
        devices: processes, one for each GPU; on a CPU they share the cores. Several train by DDP and share the
            images of an evaluation.
        precision: of training, by Fabric's name: ``"32-true"`` or ``"bf16-mixed"``. Evaluation is always in
            float32. (``"16-mixed"`` would lose the small gradients that attacks need.)
        channels_last: train in channels-last memory format, which is often faster. Evaluation never uses it.
        compile: train through ``torch.compile``, inner attacks included. Compiling takes a minute or more, and
            on a CPU it needs a C++ compiler. Evaluation never uses it.
        threads: CPU threads of each process; ``None`` shares the cores that the run may use
            (:func:`kwta_exp.hardware.usable_cores`). On a CPU the number decides the last bits of the
            weights, so it is part of the run's identity; set it to get the same run on another machine.
        deterministic: on a GPU, use deterministic algorithms alone, so that a command gives the same figures
            every time on the same GPU and software: some gradients are otherwise added up in an order that
            varies. Operations without such an algorithm raise an error that names them. It costs speed; how
            much was not measured. No effect on a CPU, where results are deterministic anyway.
    """

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: PositiveInt = 1
    precision: Precision = "32-true"
    channels_last: bool = False
    compile: bool = False
    threads: PositiveInt | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.accelerator == "cuda" and not hardware.nvidia_gpus():
            raise UserError(
                "runtime.accelerator='cuda': no NVIDIA GPU is visible on this machine;"
                " expected one, or runtime=cpu"
            )
        if self.resolved_accelerator == "cuda" and self.devices > max(1, hardware.nvidia_gpus()):
            raise UserError(
                f"runtime.devices={self.devices}: this machine has {hardware.nvidia_gpus()} visible NVIDIA"
                " GPUs; expected at most as many"
            )
        if self.compile and self.resolved_accelerator == "cpu" and not _cpp_compiler():
            raise UserError(
                "runtime.compile=True: no C++ compiler is on this machine's path;"
                " expected g++ or clang++, or runtime.compile=false"
            )

    @property
    def resolved_accelerator(self) -> Literal["cpu", "cuda"]:
        if self.accelerator == "auto":
            return "cuda" if hardware.nvidia_gpus() else "cpu"
        return self.accelerator

    @property
    def resolved_threads(self) -> int:
        return self.threads or max(1, hardware.usable_cores() // self.devices)

    def identity(self) -> dict[str, str | int | None]:
        """The values that decide the last bits of the weights.

        On a CPU these include its threads, on a GPU its name and whether its algorithms are deterministic.
        """
        on_cpu = self.resolved_accelerator == "cpu"
        gpu = None if on_cpu else hardware.first_gpu()
        return {
            "accelerator": self.resolved_accelerator,
            "devices": self.devices,
            "precision": self.precision,
            "channels_last": self.channels_last,
            "compile": self.compile,
            "threads": self.resolved_threads if on_cpu else None,
            **({} if on_cpu else {"gpu": gpu.name if gpu else None}),
            **({"deterministic": True} if self.deterministic and not on_cpu else {}),
        }

    def launch(self) -> "Fabric":
        """Load torch, set its threads and start Fabric with one process.

        Raises:
            UserError: if a GPU is there but this build of torch cannot use it.
        """
        import torch

        self.prepare()
        if self.resolved_accelerator == "cuda" and not hardware.torch_has_cuda():
            raise UserError(
                f"runtime.accelerator={self.accelerator!r}: the machine has a GPU that torch"
                f" {torch.__version__} cannot use; expected a working driver, or runtime=cpu"
            )
        fabric = self.fabric()
        fabric.launch()
        if fabric.device.type == "cuda":
            _compare_names(torch.cuda.get_device_name(fabric.device))
        return fabric

    def prepare(self) -> None:
        """Set the threads, the algorithms and the allocator of this process."""
        import torch

        torch.set_num_threads(self.resolved_threads)
        compute_in_float32()
        self._set_algorithms()
        if self.resolved_accelerator == "cpu":
            keep_freed_memory()

    def fabric(self, patience: datetime.timedelta | None = None) -> "Fabric":
        """Fabric with these settings, not launched.

        Args:
            patience: how long processes wait for each other.
        """
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment
        from lightning_fabric.strategies.ddp import DDPStrategy
        from torch.nn.parallel import DistributedDataParallel

        # Statistics of BatchNorm are averaged by the trainer: DDP would copy them between two forward passes.
        names = inspect.signature(DistributedDataParallel.__init__).parameters
        synchronises = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in names)
        settings: dict[str, Any] = {"start_method": "spawn", "timeout": patience, synchronises: False}
        ddp = DDPStrategy(**settings)
        return Fabric(
            accelerator=self.resolved_accelerator,
            devices=self.devices,
            precision=self.precision,
            plugins=[LightningEnvironment()],  # else it takes the processes of a SLURM job for those of one run
            strategy=ddp if self.devices > 1 else "auto",
        )

    def _set_algorithms(self) -> None:
        """Whether GPU operations must be deterministic; before CUDA is initialised.

        Raises:
            UserError: if CUDA is, without the workspace that cuBLAS needs for that: by an earlier job.
        """
        import torch

        deterministic = self.deterministic and self.resolved_accelerator == "cuda"
        if deterministic and torch.cuda.is_initialized() and _CUBLAS not in os.environ:
            raise UserError(
                "runtime.deterministic=True: an earlier job of this process uses CUDA without; expected the"
                f" same for all jobs, or the environment variable {_CUBLAS}={_WORKSPACE}"
            )
        if deterministic:
            os.environ.setdefault(_CUBLAS, _WORKSPACE)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.deterministic = deterministic
        torch.backends.cudnn.benchmark = False


def _compare_names(used: str) -> None:
    """Warn if the run's identity names another GPU than the one in use."""
    gpu = hardware.first_gpu()
    if gpu and gpu.name and gpu.name != used:
        log.warning(
            "the run is named after a %s but uses a %s; among unlike GPUs set CUDA_DEVICE_ORDER=PCI_BUS_ID",
            gpu.name, used,
        )  # fmt: skip


def compute_in_float32() -> None:
    """Switch TensorFloat32 off, torch's default for convolutions: ``"32-true"`` means float32."""
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _cpp_compiler() -> str | None:
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else ["g++", "clang++"])), None)
