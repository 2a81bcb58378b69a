"""Pre-train a masked autoencoder: `deepspeed launch.py --config RECIPE key.sub=value ...`.

`python launch.py ...` does the same with one rank.
"""

import argparse
import os
import sys

from fastmim import recipes
from fastmim.errors import ConfigError, FastmimError


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="launch.py", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config",
        required=True,
        metavar="RECIPE",
        help=f"{', '.join(recipes.names())}, or the path of a YAML file",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|PATH|none",
        help="the output folder's newest checkpoint if any (default); that of a run or checkpoint PATH, or, given "
        "again, what has become of it in the output folder; or a new run",
    )
    parser.add_argument(
        "--local_rank", type=int, default=None, help=argparse.SUPPRESS
    )  # the deepspeed launcher's
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="change the recipe; values are YAML"
    )
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    """Check the configuration, then train; the exit code is 0, 2 (bad input), 3 (aborted) or 128 + signal."""
    args = parse_args()
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    try:
        config = recipes.load(args.config, args.overrides)
        config.micro_batch(int(os.environ.get("WORLD_SIZE", "1")))
        config.require_source()
        try:
            import fastmim.kernels  # noqa: F401 (reads FASTMIM_KERNELS)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        from fastmim.trainer import train  # torch and DeepSpeed load only for a configuration that can run

        return train(config, args.resume)
    except FastmimError as error:
        if os.environ.get("RANK", "0") == "0" or not error.everywhere:
            print(f"launch.py: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
