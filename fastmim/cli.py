"""The `fastmim` command. Each sub-command imports what it needs when it runs, so that help is quick."""

import argparse
import sys

from fastmim import recipes
from fastmim.errors import FastmimError


def main(arguments: list[str] | None = None) -> int:
    """Run a sub-command; the exit code is 0, or 2 after one line that says what was wrong."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    # An override may stand after an option: argparse leaves it over.
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    try:
        args.run(args)
    except FastmimError as error:
        print(f"fastmim {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(
            f"fastmim {args.command}: {error.filename or 'a file'}: {error.strerror or error}",
            file=sys.stderr,
        )
        return FastmimError.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastmim", description="Masked-image pre-training: tools around launch.py."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    config = commands.add_parser("config", help="print a resolved recipe, with where each value comes from")
    config.add_argument(
        "recipe", metavar="RECIPE", help=f"{', '.join(recipes.names())}, or the path of a YAML file"
    )
    config.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change the recipe")
    config.set_defaults(run=_config)

    index = commands.add_parser("index", help="scan a source of images and say what is in it")
    index.add_argument("source", metavar="SOURCE", help="image folder, tar shards (a glob) or .npy array")
    index.add_argument("--refresh", action="store_true", help="read every file again")
    index.add_argument("--all", action="store_true", help="name every file that was left out")
    index.add_argument(
        "overrides", nargs="*", metavar="data.key=value", help="limits and channels, as in a recipe"
    )
    index.set_defaults(run=_index)

    rebuild = commands.add_parser("reconstruct", help="draw original, masked and reconstructed images")
    rebuild.add_argument("--checkpoint", required=True, metavar="RUN", help="a run or a checkpoint directory")
    rebuild.add_argument("--images", required=True, metavar="SOURCE", help="images, like data.source")
    rebuild.add_argument("--out", required=True, metavar="FILE.png")
    rebuild.add_argument("--count", type=int, default=8, help="how many images (default 8)")
    rebuild.add_argument("--seed", type=int, default=0, help="another seed removes other patches")
    rebuild.add_argument("--ema", action="store_true", help="use the averaged weights")
    rebuild.set_defaults(run=_reconstruct)

    data = commands.add_parser("data", help="make a known data set ready")
    data.add_argument(
        "name", choices=["elpv"], help="elpv: 2,624 photographs of solar cells, from elpv-dataset"
    )
    data.add_argument("--out", required=True, metavar="FOLDER")
    data.set_defaults(run=_data)
    return parser


def _config(args: argparse.Namespace) -> None:
    print(recipes.dump(*recipes.load_with_sources(args.recipe, args.overrides)), end="")


def _index(args: argparse.Namespace) -> None:
    from fastmim.data.index import build_index

    config = recipes.override(args.overrides).data
    index = build_index(args.source, config, refresh=args.refresh, option="SOURCE")
    print(index.summary(len(index.rejected)) if args.all else index.summary())


def _reconstruct(args: argparse.Namespace) -> None:
    from fastmim.reconstruct import reconstruct_images

    print(reconstruct_images(args.checkpoint, args.images, args.out, args.count, args.seed, args.ema))


def _data(args: argparse.Namespace) -> None:
    from pathlib import Path

    from fastmim.data.demo import prepare_elpv

    prepare_elpv(Path(args.out))
    print(f"{args.out}/train and {args.out}/heldout are ready")


if __name__ == "__main__":
    sys.exit(main())
