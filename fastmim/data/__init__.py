"""From a source of images to uint8 batches: index, schedule, DALI pipeline, loader.

Modules are imported by name (`from fastmim.data.index import build_index`), so that the index, which the
command line needs, loads neither torch nor DALI.
"""
