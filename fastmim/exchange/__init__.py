"""Weights in and out: timm, transformers, facebookresearch/mae, and one file of our own.

`layouts` holds every layout's names, `weights` our own runs and files, `files` reads foreign ones, `deduce` finds what
configuration they are of; `outward`, `inward` and `initial` are `fastmim export`, `fastmim import` and `model.init`.
"""
