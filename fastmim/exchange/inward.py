"""`fastmim import`: weights of timm, transformers or facebookresearch/mae become a file of our own."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmim import recipes
from fastmim.errors import CheckpointError, ConfigError
from fastmim.exchange import deduce
from fastmim.exchange.deduce import Facts
from fastmim.exchange.files import Found, check_out, read_found
from fastmim.exchange.layouts import CLS_TOKEN, POSITIONS, Architecture, Layout
from fastmim.exchange.weights import Weights, history_in, is_ours

# The tensors have these; another value would be another network.
_FIXED = (
    *(
        f"model.{key}"
        for key in ("width", "depth", "heads", "mlp_ratio", "patch_size", "positions", "positions_grid")
    ),
    *(f"objective.decoder_{key}" for key in ("width", "depth", "heads")),
    "data.channels",
)


def import_weights(
    source: str,
    out: str,
    layout: str = "auto",
    overrides: list[str] | None = None,
    fixed_positions: bool = False,
    force: bool = False,
) -> str:
    """Turn weights of another library into a file that `model.init`, `reconstruct` and `export` take.

    Args:
        source: a .safetensors or PyTorch file, or a folder of transformers or timm.
        out: .safetensors file to write.
        layout: auto, timm, transformers or mae.
        overrides: `key.sub=value` words for what the file does not tell.
        fixed_positions: take sin-cos positions in place of learned ones.
        force: replace `out`.

    Returns:
        What was imported, for a person.

    Raises:
        FastmimError: the file is of no known layout or of another architecture, or more must be told.
    """
    path = Path(out)
    check_out(path, (".safetensors",), force)
    if is_ours(Path(source)):
        raise CheckpointError(f"{source} is fastmim's own; expected another library's weights")
    given = recipes.parse_overrides(overrides or [])
    weights, notes = Foreign.read(Path(source), layout).complete(given, fixed_positions=fixed_positions)
    weights.save(path)
    what = "encoder and decoder" if weights.architecture().decoder_width else "encoder"
    model = weights.config.model
    size = f"{model.depth} blocks of width {model.width}, {model.heads} heads, patches of {model.patch_size}"
    return "\n".join([f"{path}: {what} ({size}) from {weights.history['imported_from']}", *notes])


@dataclass(frozen=True)
class Foreign:
    """Another library's weights whose tensors are known, and whose configuration is not yet complete.

    Attributes:
        found: the file, with names as `layout` has them.
        layout: of it.
        architecture: what the shapes tell.
        tensors: in our layout.
    """

    found: Found
    layout: Layout
    architecture: Architecture
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, source: Path, layout: str = "auto") -> "Foreign":
        """Read a file or folder; `CheckpointError` where it is of no known layout or of another architecture."""
        kind, found = deduce.recognise(read_found(source), layout)
        architecture = deduce.find_architecture(found, kind)
        return cls(found, kind, architecture, deduce.convert(found, kind, architecture))

    def encoder_only(self) -> "Foreign":
        """Without the decoder."""
        encoder = replace(self.architecture, decoder_width=0, decoder_depth=0)
        return replace(
            self, architecture=encoder, tensors={name: self.tensors[name] for name in encoder.shapes()}
        )

    def without_positions(self) -> "Foreign":
        """With sin-cos positions in place of a learned table, whose row for the cls token becomes a part of it."""
        tensors = dict(self.tensors)
        table = tensors.pop(POSITIONS, None)
        if table is not None:
            tensors[CLS_TOKEN] = tensors[CLS_TOKEN] + table[:, :1]
        return replace(self, architecture=replace(self.architecture, positions=0), tensors=tensors)

    def complete(
        self, given: dict[str, Any], assumed: Facts | None = None, fixed_positions: bool = False
    ) -> tuple[Weights, list[str]]:
        """The weights with a configuration, and what a person must know of the change.

        Args:
            given: part of a configuration that a person told.
            assumed: holds where neither the file nor a person tells.
            fixed_positions: take sin-cos positions in place of learned ones.

        Raises:
            FastmimError: `given` contradicts the file, something is not known, or a decoder's positions were learned.
        """
        found = self.found
        encoder, *decoder = deduce.position_tables(self.layout, self.architecture)
        fixed = decoder if self.architecture.positions else [encoder, *decoder]
        grid = deduce.find_grid(found, *(found.state[name] for name in fixed)) if fixed else None
        if fixed and grid is None and not fixed_positions:
            raise CheckpointError(
                f"{found.path}: {decoder[0]} is not the sin-cos table of {encoder}'s grid, so it was learned, and "
                "fastmim's decoders have fixed ones; fastmim import --fixed-positions takes those in its place"
            )
        left_out = fixed_positions and (self.architecture.positions > 0 or grid is None)
        taken = self.without_positions() if fixed_positions else self
        known = deduce.merge(deduce.settings_facts(found), deduce.shape_facts(taken.architecture))
        if grid is not None:
            known = deduce.merge({"model": {"positions_grid": list(grid)}}, known)
        _refuse_contradictions(given, known, found)
        known = deduce.merge(assumed or {}, deduce.standard_heads(known), known)
        if grid is not None:
            size = [side * self.architecture.patch_size for side in grid]
            known = deduce.merge(known, {"data": {"image_size": size}})
        values = deduce.merge(known, given)
        _require(values, found, bool(self.architecture.decoder_width))
        values["model"].setdefault("size", None)
        config = recipes.build(values)
        patches = found.state[encoder].shape[1] - 1
        if grid is None and patches != config.grid[0] * config.grid[1]:
            raise ConfigError(
                f"data.image_size={list(config.data.image_size)} makes {config.grid[0]} x {config.grid[1]} patches; "
                f"{found.path} has {patches} positions beside the cls token's"
            )
        history = {**history_in(found.metadata), "imported_from": f"{found.path.name} ({self.layout.name})"}
        return Weights(taken.tensors, config, history), _notes(found, self.layout, values, left_out)


def _leaves(values: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, inner in values.items()
        if isinstance(inner, dict)
        for key, value in inner.items()
    }


def _refuse_contradictions(given: dict[str, Any], known: Facts, found: Found) -> None:
    held = _leaves(known)
    for key, value in _leaves(given).items():
        if key in _FIXED and held.get(key, value) != value:
            raise ConfigError(f"{key}={value}: {found.path} has {held[key]}")


def _require(values: Facts, found: Found, decoder: bool) -> None:
    """Ask for what neither shapes nor settings tell and a guess would get wrong."""
    wanted = {"model.heads": "the number of attention heads", "data.image_size": "the size of the images"}
    if decoder:
        wanted["objective.decoder_heads"] = "the decoder's attention heads"
        wanted["objective.norm_pix_loss"] = "whether it was trained on normalised pixels"
    held = _leaves(values)
    missing = [f"{key}=... ({what})" for key, what in wanted.items() if held.get(key) is None]
    if missing:
        raise ConfigError(f"{found.path} does not tell everything; add {', '.join(missing)}")


def _notes(found: Found, layout: Layout, values: Facts, left_out: bool) -> list[str]:
    notes = []
    if left_out:
        notes.append("positions: the learned ones were left out; fixed sin-cos ones are used")
    heads = sorted(name for name in found.state if name.startswith(layout.heads))
    if heads:
        notes.append(f"left out: {', '.join(heads)}")
    if not {"mean", "std"} <= values["data"].keys():
        notes.append(
            "data.mean and data.std are not in the file: the defaults of the configuration were taken"
        )
    eps = found.settings.get("config.json", {}).get("layer_norm_eps", 1e-6)
    if eps != 1e-6:
        notes.append(f"layer_norm_eps is {eps:g} there and 1e-06 here: features differ in their last digits")
    return notes
