"""The `fastmim` command. Each sub-command imports what it needs when it runs, so that help is quick."""

import argparse
import json
import os
import sys
import textwrap
from typing import Any

from pydantic.fields import FieldInfo

from fastmim import recipes
from fastmim.errors import ConfigError, FastmimError
from fastmim.evaluate.protocols import PROTOCOLS


def main(arguments: list[str] | None = None) -> int:
    """Run a sub-command; the exit code is 0, or 2 after one line that says what was wrong."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", args.local_rank)
    # An override may stand after an option: argparse leaves it over.
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    try:
        args.run(args)
    except FastmimError as error:
        if _is_first() or not error.everywhere:
            print(f"fastmim {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(
            f"fastmim {args.command}: {error.filename or 'a file'}: {error.strerror or error}",
            file=sys.stderr,
        )
        return FastmimError.exit_code
    return 0


def _is_first() -> bool:
    """Whether this process is the one that tells what all ranks know."""
    return os.environ.get("RANK", "0") == "0"


def _settings_of_protocols() -> str:
    lines = ["settings and their defaults; what null becomes is told by eval.json:"]
    for name, protocol in PROTOCOLS.items():
        keys = [f"{key}={_default(field)}" for key, field in protocol.config.model_fields.items()]
        lines += [
            "",
            textwrap.fill(f"{name}: {' '.join(keys)}", 100, subsequent_indent="  ", break_on_hyphens=False),
        ]
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    return "..." if field.is_required() else _word(field.get_default(call_default_factory=True))


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastmim", description="Masked-image pre-training: tools around launch.py."
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher's
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
    rebuild.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="a run, checkpoint or weights file"
    )
    rebuild.add_argument("--images", required=True, metavar="SOURCE", help="images, like data.source")
    rebuild.add_argument("--out", required=True, metavar="FILE.png")
    rebuild.add_argument("--count", type=int, default=8, help="how many images (default 8)")
    rebuild.add_argument("--seed", type=int, default=0, help="another seed removes other patches")
    rebuild.add_argument("--ema", action="store_true", help="use the averaged weights")
    rebuild.set_defaults(run=_reconstruct)

    masks = commands.add_parser("masks", help="draw examples of the masks that a recipe asks for")
    masks.add_argument("recipe", metavar="RECIPE", help="as for config")
    masks.add_argument("--out", required=True, metavar="FILE.png")
    masks.add_argument("--count", type=int, default=16, help="how many masks (default 16)")
    masks.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change the recipe")
    masks.set_defaults(run=_masks)

    cka = commands.add_parser("cka", help="compare layers: of masked and whole images, or of two runs")
    cka.add_argument("run_a", metavar="RUN", help="a run, checkpoint or weights file")
    cka.add_argument(
        "run_b", metavar="OTHER", nargs="?", help="compare the layers of RUN with those of this one"
    )
    cka.add_argument("--images", required=True, metavar="SOURCE", help="images, like data.source")
    cka.add_argument("--out", required=True, metavar="FOLDER", help="for cka.png and cka.csv")
    cka.add_argument(
        "--ratios", type=float, nargs="+", metavar="R", help="of the masks (default 0.25 0.5 0.75 0.9)"
    )
    cka.add_argument("--count", type=int, default=512, help="how many images (default 512)")
    cka.add_argument("--batch", type=int, default=64, help="images that are compared at once (default 64)")
    cka.set_defaults(run=_cka)

    evaluate = commands.add_parser(
        "evaluate",
        help="measure an encoder on labelled images",
        epilog=_settings_of_protocols(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("protocol", metavar="PROTOCOL", choices=list(PROTOCOLS), help=", ".join(PROTOCOLS))
    evaluate.add_argument("--weights", required=True, metavar="RUN", help="a run, checkpoint or weights file")
    evaluate.add_argument("--data", required=True, metavar="SOURCE", help="training images, like data.source")
    evaluate.add_argument(
        "--test", metavar="SOURCE", help="test images (default: a share of each class of --data)"
    )
    evaluate.add_argument("--out", required=True, metavar="FOLDER", help="for eval.json and pictures")
    evaluate.add_argument(
        "--recipe",
        metavar="RECIPE",
        help=f"{', '.join(recipes.evaluations())}, or a YAML file (default: the paper's)",
    )
    evaluate.add_argument("--ema", action="store_true", help="use the averaged weights")
    evaluate.add_argument("--force", action="store_true", help="replace what is in FOLDER")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the protocol")
    evaluate.set_defaults(run=_evaluate)

    profile = commands.add_parser("profile", help="tell where the time and memory of a recipe's steps go")
    profile.add_argument("recipe", metavar="RECIPE", help="as for config; data.source is read")
    profile.add_argument(
        "--out", default="profile", metavar="FOLDER", help="for trace.json (default profile)"
    )
    profile.add_argument("--json", metavar="FILE", help="write the figures too")
    profile.add_argument("--steps", type=_positive, default=10, help="how many are measured (default 10)")
    profile.add_argument("--warmup", type=_positive, default=5, help="steps before them (default 5)")
    profile.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change the recipe")
    profile.set_defaults(run=_profile)

    export = commands.add_parser(
        "export", help="write weights for timm, transformers or facebookresearch/mae"
    )
    export.add_argument("source", metavar="RUN", help="a run, a checkpoint directory or a weights file")
    export.add_argument("out", metavar="OUT", help="a file; a folder for transformers")
    export.add_argument(
        "--to",
        required=True,
        choices=["timm", "transformers", "mae", "fastmim"],
        help="who is to load it: timm, transformers (a folder), facebookresearch/mae (.pth), or this engine",
    )
    export.add_argument("--encoder-only", action="store_true", help="leave the decoder out")
    export.add_argument("--ema", action="store_true", help="use the averaged weights")
    export.add_argument(
        "--image-size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="position tables for another size of image",
    )
    export.add_argument("--force", action="store_true", help="replace OUT")
    export.set_defaults(run=_export)

    bring = commands.add_parser("import", help="turn weights of other libraries into a file to start from")
    bring.add_argument("source", metavar="SOURCE", help="a .safetensors or .pth file, or a folder")
    bring.add_argument("out", metavar="OUT", help="a .safetensors file")
    bring.add_argument(
        "--from",
        dest="layout",
        default="auto",
        choices=["auto", "timm", "transformers", "mae"],
        help="whose names the file has (default: told by the names)",
    )
    bring.add_argument(
        "--fixed-positions", action="store_true", help="sin-cos positions in place of learned ones"
    )
    bring.add_argument("--force", action="store_true", help="replace OUT")
    bring.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="what SOURCE does not tell, such as model.heads=6",
    )
    bring.set_defaults(run=_import)

    data = commands.add_parser("data", help="make a known data set ready")
    data.add_argument(
        "name",
        choices=["elpv", "fashion-mnist", "idx"],
        help="elpv: 2,624 photographs of solar cells, from elpv-dataset; fashion-mnist: from Debian's "
        "dataset-fashion-mnist; idx: any set in the files of MNIST",
    )
    data.add_argument("--idx", metavar="DIR", help="where the IDX files are, packed by gzip or not")
    data.add_argument("--out", required=True, metavar="FOLDER")
    data.set_defaults(run=_data)
    return parser


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}; expected an integer > 0")
    return int(word)


def _config(args: argparse.Namespace) -> None:
    print(recipes.dump(*recipes.load_with_sources(args.recipe, args.overrides)), end="")


def _index(args: argparse.Namespace) -> None:
    from fastmim.data.index import build_index

    if other := [word for word in args.overrides if not word.startswith("data.")]:
        raise ConfigError(f"{other[0]}: an index depends on data alone; expected data.key=value")
    config = recipes.override(args.overrides).data
    index = build_index(args.source, config, refresh=args.refresh, option="SOURCE")
    print(index.summary(len(index.rejected)) if args.all else index.summary())


def _reconstruct(args: argparse.Namespace) -> None:
    from fastmim.reconstruct import reconstruct_images

    print(reconstruct_images(args.checkpoint, args.images, args.out, args.count, args.seed, args.ema))


def _masks(args: argparse.Namespace) -> None:
    from fastmim.mask_sheet import draw_mask_sheet

    print(draw_mask_sheet(recipes.load(args.recipe, args.overrides), args.out, args.count))


def _cka(args: argparse.Namespace) -> None:
    from fastmim.evaluate.cka import compare

    if args.run_b is not None and args.ratios is not None:
        raise ConfigError(
            "--ratios with two runs; expected one run, whose masked and whole images are compared"
        )
    ratios = args.ratios or [0.25, 0.5, 0.75, 0.9]
    print(compare(args.run_a, args.run_b, args.images, args.out, ratios, args.count, args.batch))


def _evaluate(args: argparse.Namespace) -> None:
    from fastmim.evaluate.run import evaluate

    told = evaluate(
        args.protocol,
        args.weights,
        args.data,
        args.test,
        args.out,
        args.overrides,
        recipe=args.recipe,
        ema=args.ema,
        force=args.force,
    )
    if _is_first():
        print(told)


def _profile(args: argparse.Namespace) -> None:
    # Before torch is loaded: its profiler tells of each start, and of a GPU that is not there.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from fastmim.profiling.run import profile

    config = recipes.load(args.recipe, args.overrides)
    told = profile(args.recipe, config, args.out, args.json, args.steps, args.warmup)
    if told is not None:
        print(told)


def _export(args: argparse.Namespace) -> None:
    from fastmim.exchange.outward import export_weights

    size = tuple(args.image_size) if args.image_size else None
    print(export_weights(args.source, args.out, args.to, args.encoder_only, args.ema, size, args.force))


def _import(args: argparse.Namespace) -> None:
    from fastmim.exchange.inward import import_weights

    print(
        import_weights(args.source, args.out, args.layout, args.overrides, args.fixed_positions, args.force)
    )


def _data(args: argparse.Namespace) -> None:
    from pathlib import Path

    if args.name == "elpv":
        from fastmim.data.demo import LABELS, prepare_elpv

        if args.idx is not None:
            raise ConfigError(
                f"--idx {args.idx} with elpv, which is a package's; expected fashion-mnist or idx"
            )
        prepare_elpv(Path(args.out))
        print(f"{args.out}/train, {args.out}/heldout and {args.out}/{LABELS} are ready")
        return
    from fastmim.data.idx import FASHION_MNIST, prepare_idx

    if args.name == "idx" and args.idx is None:
        raise ConfigError("idx without --idx; expected the folder of the files")
    prepare_idx(Path(args.idx or FASHION_MNIST), Path(args.out))
    print(f"{args.out}: train.npy and test.npy, train_labels.npy and test_labels.npy are ready")


if __name__ == "__main__":
    sys.exit(main())
