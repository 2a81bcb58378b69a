"""One script a question, and what the scripts share: cases, counting, compiling, timing."""
