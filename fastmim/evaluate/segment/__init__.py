"""Semantic segmentation: a head on an encoder's maps, trained on images with masks, measured by mIoU."""
