"""How the model lies on a mesh of devices. The logical axes of every parameter are in `m1jax.params`."""
