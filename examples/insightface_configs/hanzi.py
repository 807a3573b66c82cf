# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains the demo's characters: some minutes on two cores."""

config = dict(
    margin_list=(1.0, 0.0, 0.2),
    network="demo",
    embedding_size=128,
    batch_size=128,
    lr=0.02,
    rec="hanzi",
    num_classes=4355,
    num_image=17420,
    num_epoch=5,
    warmup_epoch=1,
    val_targets=["hanzi"],
    verbose=136,  # once an epoch
    save_all_states=True,
)
