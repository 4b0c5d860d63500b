"""One process of a stage: `python -m unigrpo.stages.run <stage> <name>`, started by torch.distributed.run or like it.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m unigrpo.stages.run train tiny-unigrpo-0

A user's mistake ends as one line and status 2, Ctrl-C as status 130, another process that hangs or has died as one line that
names the step and status 1. UNIGRPO_PROVENANCE in the environment is a JSON object of what the launcher knows.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

PROVENANCE = "UNIGRPO_PROVENANCE"
GRACE = 2.0  # seconds in which a process that has ended for a reason of its own is gone, so that its status counts first


def main(arguments: list[str]) -> int:
    """The command line. Returns the exit status."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    if sys.platform == "linux":  # a killed agent leaves no trainer behind; 1 = PR_SET_PDEATHSIG
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)
    from unigrpo.distributed import Deserted
    from unigrpo.stages import run_stage
    from unigrpo.tracking import start_courier

    root = Path(os.environ.get("UNIGRPO_ROOT") or ".")
    if int(os.environ.get("RANK", "0")) == 0:
        start_courier(root)
    try:
        run_stage(arguments[0], arguments[1], root, json.loads(os.environ.get(PROVENANCE) or "{}"))
    except ValueError as error:
        if os.environ.get("UNIGRPO_TRACEBACK"):
            raise
        print(f"{' '.join(arguments)}: {error}\n(UNIGRPO_TRACEBACK=1 shows where)", file=sys.stderr, flush=True)
        return 2
    except Deserted as error:
        if os.environ.get("UNIGRPO_TRACEBACK"):
            raise
        print(error, file=sys.stderr, flush=True)
        time.sleep(GRACE)
        os._exit(1)  # gloo's threads would wait for the others once more
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
