# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains as speechbrain's recipe for speaker embeddings, from hyperparameters in YAML.

python examples/trainers/speechbrain_recipe.py
"""

from typing import Any

import torch
from torch.utils.data import DataLoader

import compare

HYPERPARAMETERS = """
classifier: !new:{classifier}
    input_size: {size}
    out_neurons: {classes}

compute_cost: !new:{losses}.LogSoftmaxWrapper
    loss_fn: !new:{losses}.AdditiveAngularMargin
        margin: 0.2
        scale: 30
"""
ORIGINAL = dict(
    classifier="speechbrain.lobes.models.ECAPA_TDNN.Classifier", losses="speechbrain.nnet.losses"
)
FUSED = dict(
    classifier="marginkernels.compat.speaker.Classifier", losses="marginkernels.compat.speaker"
)


def train(ours: bool, run: compare.Run) -> None:
    """Trains with speechbrain's classifier and loss, or with those that the YAML names instead."""
    import speechbrain
    from hyperpyyaml import load_hyperpyyaml

    class SpeakerBrain(speechbrain.Brain):
        def compute_forward(self, batch: Any, stage: Any) -> torch.Tensor:
            """Computes cosines (B, 1, C)."""
            embeddings = self.modules.embedding_model(batch[0])
            return self.modules.classifier(embeddings.unsqueeze(1))

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> torch.Tensor:
            """Computes the loss."""
            return self.hparams.compute_cost(predictions, batch[1].unsqueeze(1))

        def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
            """Logs the loss of the step."""
            run.log(loss)

    loader = DataLoader(run.examples(), batch_size=run.batch_size)
    names = FUSED if ours else ORIGINAL
    text = HYPERPARAMETERS.format(size=compare.EMBEDDING_SIZE, classes=run.classes, **names)
    hparams = load_hyperpyyaml(text)
    brain = SpeakerBrain(
        {"embedding_model": run.backbone(), "classifier": hparams["classifier"]},
        lambda parameters: torch.optim.Adam(parameters, lr=1e-3, weight_decay=2e-6),
        hparams,
        run_opts={"device": "cpu"},
    )
    brain.fit(range(1), loader, progressbar=False)


if __name__ == "__main__":
    compare.main(train)
