"""One small call of every op, forward and backward, on one backend: what the sanitizer looks at.

python -m benchmarks.gpu.exercise BACKEND [DEVICE]
"""

import sys

import torch

from benchmarks.cases import lists
from bertfast import backend


def main() -> int:
    """Run the small cases; returns the exit code: 1 where one raises anything but a refusal."""
    name, device = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "cuda"
    failed = 0
    for case in lists.small(device):
        try:
            with backend.use(name):
                for result in case.results(case.ours, case.inputs(0)):
                    assert torch.isfinite(result.float()).all()
            print(f"{case.key}: ran", flush=True)
        except Exception as error:
            refused = isinstance(error, backend.BackendError)
            failed += not refused
            print(f"{case.key}: {'refused' if refused else 'Error'}: {type(error).__name__}: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
