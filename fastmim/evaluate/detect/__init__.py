"""Object detection: R-CNN on an encoder's feature pyramid, trained on COCO's annotations, measured by its mAP."""
