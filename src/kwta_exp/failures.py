"""Which errors come from the machine, and which say that a network has no gradient.

torch raises a RuntimeError for all of them, so whoever catches one must tell them apart: what the machine did
says nothing about a network.
"""

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN
    "std::bad_alloc",
)

_DEVICE = (
    "CUDA error",
    "CUDA driver error",
    "cuDNN error",
    "CUDNN_STATUS",
    "CUBLAS_STATUS",
    "device-side assert",
    "NVIDIA driver",
)

_NO_GRADIENT = (
    "does not require grad",  # nothing between input and logits is differentiable
    "appears to not have been used in the graph",
    "the derivative for",  # ... is not implemented
    "derivative for aten",  # the same
    "You must implement either the backward or vjp method",
    "Can't call numpy() on Tensor that requires grad",
    "Inference tensors cannot be saved for backward",
    "has been modified by an inplace operation",
    "Trying to backward through the graph a second time",
)
"""Parts of the messages of torch's autograd."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU or the machine had no memory left: a smaller batch may succeed."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(part in str(error) for part in _OUT_OF_MEMORY)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether the error says nothing about a network: no memory, or a failure of the GPU or its libraries."""
    if is_out_of_memory(error):
        return True
    if not isinstance(error, RuntimeError):
        return False
    import torch

    return isinstance(error, torch.AcceleratorError) or any(part in str(error) for part in _DEVICE)


def no_gradient_exists(error: BaseException) -> bool:
    """Whether autograd says that the logits are not a differentiable function of the images.

    Any other error while a gradient is computed says nothing about the gradient.
    """
    is_autograd = isinstance(error, RuntimeError) and not is_of_the_machine(error)
    return is_autograd and any(part in str(error) for part in _NO_GRADIENT)


def first_line(error: BaseException) -> str:
    """The first line of the message: torch appends hints and stack traces."""
    return (str(error) or type(error).__name__).splitlines()[0]
