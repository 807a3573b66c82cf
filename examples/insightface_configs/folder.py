# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains on a folder of aligned faces with a folder per person, as MS1MV3 unpacked."""

config = dict(
    margin_list=(1.0, 0.5, 0.0),
    network="r50",
    embedding_size=512,
    sample_rate=1.0,
    fp16=True,
    momentum=0.9,
    weight_decay=5e-4,
    batch_size=128,
    lr=0.02,
    rec="/train_tmp/ms1m-retinaface-t1",
    num_classes=93431,
    num_image=5179510,
    num_epoch=20,
    val_targets=["lfw", "cfp_fp", "agedb_30"],  # lfw.bin and others in the folder
    save_all_states=True,
)
