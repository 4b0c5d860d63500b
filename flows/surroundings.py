"""The environment that a stage's numbers depend on, and the command that starts its processes; on any machine."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from unigrpo.config import Config
from unigrpo.stages import SHARED
from unigrpo.stages.run import PROVENANCE

# glibc returns large blocks to the kernel when they are freed and faults every page in again when they are asked for next.
# Element-wise work on activations is bound by these page faults: one GELU of 8192 x 512 floats takes 19.5 ms with the
# defaults and 0.5 ms when freed blocks up to 32 MiB stay in the heap. Read once at process start, so it is set here.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
# A thread of libgomp that waits for work spins first. Its default, 300,000 turns, costs nothing where the cores are idle; where
# another process wants them a step of RL takes five times as long as with 2,000, which cost nothing on idle cores either.
WAITING = {"GOMP_SPINCOUNT": "2000"}

# What keeps an x86 processor to AVX2, whatever it has: PyTorch's own kernels, oneDNN, MKL and numpy. A library reads its own at
# import, and those of other processors ignore them. At scale tiny a step takes as long with them as without.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"}

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "true",
           "MLFLOW_DISABLE_TELEMETRY": "true", "DVC_NO_ANALYTICS": "1", "ITERATIVE_DO_NOT_TRACK": "1"}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")
SHUTDOWN = 600  # seconds that processes get to end their step and save it after SIGTERM; who takes the machine may kill sooner
PORT = 29500   # where processes of several machines meet


def environment(config: Config, base: Mapping[str, str], root: Path) -> dict[str, str]:
    """The environment of a stage in `root`: everything numbers depend on is set, whatever the machine had."""
    own = {name: value for name, value in base.items() if name not in AVX2}  # of the shell: numbers do not depend on it
    env = WAITING | own | MALLOC | OFFLINE | {name: str(config.compute.threads) for name in THREADS}
    if config.compute.instructions == "avx2":
        env |= AVX2
    return env | {"PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
                  "PYTHONPATH": os.pathsep.join(filter(None, [str(root), base.get("PYTHONPATH", "")])), "MPLBACKEND": "Agg",
                  "UNIGRPO_SCALE": config.scale, "UNIGRPO_ROOT": str(root)}


def processes(config: Config, stage: str) -> int:
    """How many processes work on a stage: what params say on those that can share their work, one on the others."""
    return config.processes(stage) if stage in SHARED else 1


def per_node(processes: int, nodes: int, key: str = "compute.processes") -> int:
    """How many of a stage's processes each machine starts. Raises ValueError, naming `key`, where they do not spread evenly."""
    if processes % nodes:
        near = sorted({max(nodes, processes - processes % nodes), processes + nodes - processes % nodes})
        raise ValueError(f"{key}={processes} must be a multiple of compute.remote.nodes={nodes}: every machine "
                         f"starts as many; the nearest valid values are {near}")
    return processes // nodes


def command(stage: str, name: str, *, processes: int = 1, nodes: int = 1, node: int = 0, address: str = "127.0.0.1",
            port: int = PORT) -> list[str]:
    """What starts this node's processes of a stage, in the project's root.

    Args:
        processes: of all nodes together. nodes: how many machines, node: which one this is. address, port: of the first.
    Raises: ValueError where the processes do not spread evenly.
    """
    share = per_node(processes, nodes)
    main = ["-m", "unigrpo.stages.run", stage, name]
    if processes == 1:
        return [sys.executable, *main]
    where = ["--standalone"] if nodes == 1 else ["--nnodes", str(nodes), "--node-rank", str(node), "--master-addr", address,
                                                 "--master-port", str(port)]
    return [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(share), "--shutdown-timeout",
            str(SHUTDOWN), *main]


def told(provenance: Mapping[str, str]) -> dict[str, str]:
    """The variable in which a stage's process finds what the launcher knows."""
    return {PROVENANCE: json.dumps(dict(provenance), sort_keys=True)}
