"""A stage of scale smoke in this process of several, in the folder it is started in: `stage_process.py base|sft|train [SAVES]`.

With SAVES a training dies after so many saved steps, as by Ctrl-C.
"""

from __future__ import annotations

import sys

from unigrpo.stages import base, sft, train


def die_after(saves: int) -> None:
    """Let the training be interrupted."""
    whole, seen = train.save, []

    def save(*arguments) -> None:
        whole(*arguments)
        seen.append(arguments)
        if len(seen) == saves:
            raise KeyboardInterrupt

    train.save = save  # type: ignore[assignment]


def main(stage: str, *saves: str) -> None:
    """Run it."""
    if saves:
        die_after(int(saves[0]))
    if stage == "train":
        train.run("smoke", run="unigrpo", seed=0)
    else:
        {"base": base, "sft": sft}[stage].run("smoke")


if __name__ == "__main__":
    main(*sys.argv[1:])
