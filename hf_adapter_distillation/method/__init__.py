"""One training forward pass of a distilled student: from the layers, in which its teachers run beside it, to the loss.

In reading order: `forward`, `calls`, `distillation` and `wrappers` (a pass from the outside), `layer_pass`,
`training_pass`, `layers` and `whole_layers` (a pass inside the layers), `fusion`, `weights`, `stacking`,
`chunked_attention` and `low_rank` (the teachers of one layer), `losses`, `logit_losses`, `layer_match`, `embeddings`,
`answers`, `predictions` and `heads` (the objectives), `terms` and `term_gradient` (what reaches the loss),
`parameters` and `nonfinite` (the checks).
"""
