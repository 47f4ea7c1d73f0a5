"""LoRA (arXiv 2106.09685): small factors are trained beside matrices that stay as they are, W + alpha / rank · B A.

`factors` has them as arrays and puts them into a model, which computes with them as `adapted` says; `adapter` is their
folder in PEFT's layout, and adds them to the weights that are read.
"""
