"""torchvision's Faster and Mask R-CNN on an encoder's pyramid, and what they find in whole images."""

import math
from collections.abc import Iterator

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from fastmim.config_data import DataConfig
from fastmim.evaluate.dense import DenseEncoder
from fastmim.evaluate.detect.annotations import BoxedImages
from fastmim.evaluate.detect.batches import Target, decoded, whole_images
from fastmim.evaluate.detect.coco import Detections, encode
from fastmim.evaluate.detect.config import DetectConfig
from fastmim.evaluate.detect.pyramid import LEVELS, SCALES, PyramidBackbone

_ANCHOR = 8  # sides of an anchor over the stride of its level
_ASPECTS = (0.5, 1.0, 2.0)
_CONVOLUTIONS = 4
_BOX_GRID, _MASK_GRID = 7, 14


class SquareTransform(nn.Module):
    """Takes the place of torchvision's transform: bytes in, bytes out, filled up to a square.

    Images come resized, and the encoder's first kernel subtracts the mean and divides by the deviation as it gathers
    patches; torchvision's transform would do either a second time.

    Args:
        side: of the square, pixels.
        mean: of each channel, where white is 1; what is filled in.
    """

    fill: Tensor

    def __init__(self, side: int, mean: list[float]):
        super().__init__()
        self.side = side
        self.register_buffer(
            "fill", torch.tensor(mean).mul(255).round().to(torch.uint8)[:, None, None], persistent=False
        )

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> tuple[ImageList, list[Target] | None]:
        """Images uint8 [C, h, w], h and w at most `side` -> uint8 [B, C, side, side], each upper left; same targets."""
        squares = self.fill.repeat(len(images), 1, self.side, self.side)
        for square, image in zip(squares, images, strict=True):
            square[:, : image.shape[1], : image.shape[2]] = image
        return ImageList(squares, [(image.shape[1], image.shape[2]) for image in images]), targets

    def postprocess(self, found: list[Target], sizes: list, originals: list) -> list[Target]:
        """Boxes and masks stay those of the resized image."""
        return found


class Detector(nn.Module):
    """A detector with the layers of learning rates.

    Args:
        network: torchvision's, on a `PyramidBackbone`.
    """

    def __init__(self, network: FasterRCNN):
        super().__init__()
        self.network = network

    def forward(self, images: list[Tensor], targets: list[Target] | None = None):
        """As torchvision's detectors, of images uint8 [C, h, w]: losses in training, else what is found."""
        return self.network(images, targets)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """The layers of learning rates, for timm: the embedding, each block, and the rest."""
        encoder = r"network\.backbone\.encoder\.encoder"
        return {
            "stem": rf"{encoder}\.(?:patch_embed|cls_token|pos_embed)",
            "blocks": rf"{encoder}\.blocks\.layers\.(\d+)",
        }


def build_detector(encoder: DenseEncoder, config: DetectConfig, mean: list[float], classes: int) -> Detector:
    """The detector that a configuration asks for; what is not the encoder is drawn from its seed alone.

    The heads are ViTDet's: two convolutions before proposals, four with norms and a linear layer before boxes, four
    with norms before masks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone, width = PyramidBackbone(encoder, config.width, config.precision), config.width
        strides = [encoder.patch_size / scale for scale in (*SCALES, SCALES[-1] / 2)]
        sizes = tuple((round(_ANCHOR * stride),) for stride in strides)
        convolutions = [width] * _CONVOLUTIONS
        options = {
            "rpn_anchor_generator": AnchorGenerator(sizes, (_ASPECTS,) * len(sizes)),
            "rpn_head": RPNHead(width, len(_ASPECTS), conv_depth=2),
            "rpn_pre_nms_top_n_train": 2 * config.proposals,
            "rpn_pre_nms_top_n_test": config.proposals,
            "rpn_post_nms_top_n_train": config.proposals,
            "rpn_post_nms_top_n_test": config.proposals,
            "rpn_batch_size_per_image": config.rpn_samples,
            "box_roi_pool": _pool(strides[:-1], _BOX_GRID),
            "box_head": FastRCNNConvFCHead(
                (width, _BOX_GRID, _BOX_GRID), convolutions, [config.hidden], norm_layer=LayerNorm2d
            ),
            "box_predictor": FastRCNNPredictor(config.hidden, classes + 1),
            "box_batch_size_per_image": config.box_samples,
        }
        if config.masks:
            options |= {
                "mask_roi_pool": _pool(strides[:-1], _MASK_GRID),
                "mask_head": MaskRCNNHeads(width, convolutions, dilation=1, norm_layer=LayerNorm2d),
                "mask_predictor": MaskRCNNPredictor(width, width, classes + 1),
            }
        network = (MaskRCNN if config.masks else FasterRCNN)(backbone, **options)
    network.transform = SquareTransform(config.image_size, mean)
    return Detector(network)


def _pool(strides: list[float], grid: int) -> MultiScaleRoIAlign:
    pool = MultiScaleRoIAlign(list(LEVELS[:-1]), grid, sampling_ratio=2)
    # Told, since torchvision guesses them from the first images, which it takes to fill the square.
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(*(round(math.log2(stride)) for stride in (strides[0], strides[-1])))
    return pool


@torch.no_grad()
def detect(
    model: Detector,
    images: BoxedImages,
    data: DataConfig,
    config: DetectConfig,
    size: int,
    device: torch.device,
) -> Iterator[Detections]:
    """What is found in each image, in their order.

    Args:
        model: in evaluation mode.
        images: to test on.
        data: how the encoder's images are read.
        config: image_size and head are read.
        size: images in a forward pass.
        device: where the model is.
    """
    kinds = torch.tensor(list(images.categories), device=device)
    crops = whole_images(images, config.image_size)
    batches = decoded(images, data, crops, config.image_size, size, device)
    found = (each for batch in batches for each in model(batch))
    plan = crops.plan
    shapes = zip(
        plan.height.tolist(), plan.width.tolist(), crops.heights.tolist(), crops.widths.tolist(), strict=True
    )
    for height, width, shown_height, shown_width in shapes:
        each = next(found)
        factor = torch.tensor(
            [width / shown_width, height / shown_height], device=device, dtype=torch.float64
        )
        boxes = each["boxes"].double() * factor.repeat(2)
        masks = None
        if config.masks:
            pasted = paste_masks_in_image(each["masks"], boxes.float(), (height, width))[:, 0]
            masks = encode((pasted >= 0.5).cpu().numpy())
        yield Detections(
            boxes.cpu().numpy(),
            each["scores"].double().cpu().numpy(),
            kinds[each["labels"] - 1].cpu().numpy(),
            masks,
        )
