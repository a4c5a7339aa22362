"""Energy: the joules that a GPU has used, where NVIDIA's management library tells.

The counter is the card's own, of all that runs on it, in thousandths of a joule, and moves some ten times a second:
only differences over a second or more mean something. Volta and later cards have it.
"""

import ctypes
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"  # what the driver installs


class Meter:
    """The energy counter of one GPU."""

    def __init__(self, library: Any, device: Any) -> None:
        self._library, self._device = library, device

    @classmethod
    def find(cls, uuid: str | None = None, library: Any = None) -> "Meter | None":
        """The meter of the GPU with this UUID, as PyTorch's device properties have it, or of the first one.

        library: stands in for the driver's. None where there is no library, no such GPU or no counter.
        """
        try:
            library = library or ctypes.CDLL(_LIBRARY)
            if library.nvmlInit_v2():
                return None
            device = ctypes.c_void_p()
            if uuid is None:
                failed = library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
            else:
                name = f"GPU-{uuid.removeprefix('GPU-')}".encode()
                failed = library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(device))
        except (OSError, AttributeError):  # no driver, or one without these functions
            return None
        meter = cls(library, device)
        return None if failed or meter.joules() is None else meter

    def joules(self) -> float | None:
        """What the GPU has used since its driver was loaded; None where it does not tell."""
        used = ctypes.c_ulonglong()
        try:
            failed = self._library.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(used))
        except AttributeError:
            return None
        return None if failed else used.value / 1e3
