"""transformers' ViTMAE as its users train it: torchvision's transforms, a DataLoader, autocast, a loop.

`python -P benchmarks/plain_vitmae.py CONFIG INITIAL FOLDER SECONDS WORKERS` follows a run's config.yaml: its images,
batch, learning rate, mask ratio, weight decay and clipping. The schedule is over when the seconds are.
"""

import time

_STARTED = time.monotonic()  # imports count: a user waits for them too

import json  # noqa: E402
import sys  # noqa: E402
from itertools import chain, count  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from timm.optim import param_groups_weight_decay  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision import transforms  # noqa: E402
from transformers import ViTMAEForPreTraining  # noqa: E402

from fastmim import recipes  # noqa: E402
from fastmim.config import Config  # noqa: E402
from fastmim.optim import learning_rate  # noqa: E402
from fastmim.precision import choose_precision  # noqa: E402


class Images(Dataset):
    """The images of an .npy array or of a folder, augmented by torchvision.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config):
        data = config.data
        source = Path(config.require_source())
        self.mode = "L" if data.channels == 1 else "RGB"
        self.array = np.load(source, mmap_mode="r") if source.suffix == ".npy" else None
        self.paths = [] if self.array is not None else sorted(p for p in source.rglob("*") if p.is_file())
        bicubic = transforms.InterpolationMode.BICUBIC
        crop = transforms.RandomResizedCrop(data.image_size, data.scale, data.aspect, interpolation=bicubic)
        self.transform = transforms.Compose(
            [
                crop,
                transforms.RandomHorizontalFlip(data.flip),
                transforms.ToTensor(),
                transforms.Normalize(data.mean, data.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths) if self.array is None else len(self.array)

    def __getitem__(self, i: int) -> torch.Tensor:
        if self.array is None:
            with Image.open(self.paths[i]) as image:
                return self.transform(image.convert(self.mode))
        pixels = self.array[i]
        return self.transform(Image.fromarray(pixels[..., 0] if self.mode == "L" else pixels))


def train(config: Config, initial: Path, folder: Path, started: float, seconds: float, workers: int) -> None:
    """Train until `seconds` after `started`, by the monotonic clock; writes `folder`/model and told.json."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.train.seed)
    bf16 = choose_precision(config.train.precision, device) == "bf16"  # as the run that it is beside
    model = ViTMAEForPreTraining.from_pretrained(initial).to(device).train()
    for name, parameter in model.named_parameters():
        # Fixed tables in a new model, which from_pretrained of transformers 5 lets train.
        if name.endswith(("position_embeddings", "decoder_pos_embed")):
            parameter.requires_grad_(False)
    optim = config.optim
    groups = param_groups_weight_decay(model, optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    loader = DataLoader(
        Images(config),
        optim.batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    progress, steps = 0.0, 0
    for images in chain.from_iterable(loader for _ in count()):
        rate = learning_rate(optim, progress * optim.epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(images.to(device, non_blocking=True)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if optim.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        optimizer.step()
        steps += 1
        progress = (time.monotonic() - started) / seconds
        if progress >= 1:
            break
    model.save_pretrained(folder / "model")
    told = {"steps": steps, "images": steps * optim.batch_size}
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    config, initial, folder, seconds, workers = sys.argv[1:]
    train(recipes.load(config), Path(initial), Path(folder), _STARTED, float(seconds), int(workers))
