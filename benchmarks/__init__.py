"""One script a question, and what the scripts share: cases, counting, compiling, timing."""

import fastmim  # noqa: F401 (before torchvision, so that DALI decodes by its own nvJPEG)
