"""`unigrpo serve-rewards`: rewards in a process of their own."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the top parser's sub-commands."""
    parser = commands.add_parser("serve-rewards", help="score images for training runs, in a process of its own")
    parser.add_argument("names", nargs="+", metavar="NAME", help="rewards by name, or your own module:name (imported)")
    parser.add_argument("--host", default="127.0.0.1", help="another address than this machine's own needs a token")
    parser.add_argument("--port", type=int, default=8741, help="0 takes a free one; the first line of output tells which")
    parser.add_argument("--token-env", metavar="NAME", help="environment variable that holds the token clients must send")
    parser.add_argument("--options", type=Path, metavar="FILE", help="JSON: reward name -> its options")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 by default")
    parser.add_argument("--max-images", type=int, default=256, help="per request")
    parser.add_argument("--max-pixels", type=int, default=4 << 20, help="per image")
    parser.add_argument("--max-bytes", type=int, default=256 << 20, help="per request")
    parser.add_argument("--verbose", action="store_true", help="log every request")
    parser.set_defaults(function=run)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted; returns the exit status. Raises ValueError for what the user can mend."""
    import logging

    import torch

    from unigrpo.rewards.registry import make_reward
    from unigrpo.rewards.server import Bounds, RewardServer

    for flag in ("threads", "max_images", "max_pixels", "max_bytes"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port must lie in [0, 65535], got {args.port}")
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, stream=sys.stderr,
                        format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(args.threads)
    options = read_options(args.options, args.names)
    token = None
    if args.token_env is not None:
        token = os.environ.get(args.token_env, "").strip()
        if not token:
            raise ValueError(f"the environment variable {args.token_env} is empty; put the token there")
    rewards = {name: make_reward(name, options.get(name)) for name in args.names}
    server = RewardServer((args.host, args.port), rewards, token=token,
                          bounds=Bounds(body=args.max_bytes, images=args.max_images, pixels=args.max_pixels))
    host, port = server.server_address[:2]
    print(f"http://{host!s}:{port} serves {', '.join(sorted(rewards))}", flush=True)
    with server:
        server.serve_forever()
    return 0


def read_options(path: Path | None, names: list[str]) -> dict[str, dict[str, Any]]:
    """reward name -> options, from a JSON file. Raises ValueError for another form or names that are not served."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: a JSON object, reward name -> options, wanted: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()) or set(found) - set(names):
        raise ValueError(f"{path}: a JSON object, reward name -> options, wanted for some of {', '.join(names)}")
    return found
