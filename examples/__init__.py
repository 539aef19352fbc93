"""Five VAEs whose KL goes to 0, and what headroom.post_mortem says about each of them.

Each module is a training script of its own, as someone would write it who has headroom.py and
docs/own_model.md. Except for `post_mortem`, it uses nothing of this project. It trains a model with
a usual mistake, asks for the cause of the collapse, and tests the answer with two new models: one
with a remedy of the kind that the answer names, and one with a change that, according to the
answer, would not help.

    mlp            a VAE of two perceptrons
    convolutional  a convolutional VAE
    conditional    a conditional VAE of a digit given its label
    hierarchy      a hierarchical VAE with two levels
    sequence       a VAE of sentences with an autoregressive decoder

`python -m examples.mlp` runs one example. `python -m examples` runs all of them and writes
results/post_mortems.csv.
"""
