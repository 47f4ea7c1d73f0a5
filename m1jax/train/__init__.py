"""Training: `python -m m1jax.train --config FILE.toml`, stages pretrain, sft and rl.

| module | what it holds |
|---|---|
| `settings` | the TOML file as dataclasses |
| `data` | documents to packed rows, through grain |
| `forward`, `loss` | the forward pass in the form that gradients want; cross-entropy in pieces, balancing loss |
| `step` | one optimiser step: accumulation, clipping, AdamW, the guard against NaN and spikes |
| `saving` | checkpoints (Orbax) and the trained model |
| `report` | progress, JSONL, TensorBoard, the picture of the curves |
| `interruption` | Ctrl-C and SIGTERM, held back until a step has ended |
| `loop` | the run: all of these together |
"""
