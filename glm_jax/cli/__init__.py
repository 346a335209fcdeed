"""The program `glm-jax`: one file a verb, each of them thin. Nothing here imports jax before the flags are parsed."""
