"""The offline half of stpatch: one module per Snakemake rule, pure functions and a short ``__main__`` block."""
