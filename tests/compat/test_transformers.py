# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains transformers' speaker models with its Trainer, with its objective and with the fused one.

The models are made here: nothing comes from a hub.
"""

import copy
import importlib

import pytest
import torch
from torch.utils.data import TensorDataset

from marginkernels.compat.transformers import AMSoftmaxLoss, replace_objective

transformers = pytest.importorskip("transformers", exc_type=ImportError)

MODELS = {
    "Wav2Vec2": "wav2vec2",
    "WavLM": "wavlm",
    "UniSpeechSat": "unispeech_sat",
    "Data2VecAudio": "data2vec",
    "Wav2Vec2Conformer": "wav2vec2_conformer",
    "Wav2Vec2Bert": "wav2vec2_bert",
}
C, D, SAMPLES, FEATURES = 13, 10, 400, 6


def make(name="Wav2Vec2", **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        feature_projection_input_dim=FEATURES, tdnn_dim=(12, 12, 20), tdnn_kernel=(3, 3, 1),
        tdnn_dilation=(1, 1, 1), xvector_output_dim=D, num_labels=C, hidden_dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0,
        conformer_conv_dropout=0.0, mask_time_prob=0.0, **settings,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForXVector")(config)
    for layer in model.modules():  # they start so small that the embeddings would be 0
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(layer.weight)
    return model


def speech(name="Wav2Vec2", n=7):
    torch.manual_seed(1)
    shape = (n, 40, FEATURES) if name == "Wav2Vec2Bert" else (n, SAMPLES)
    return torch.randn(shape), torch.randint(C, (n, 1))


@pytest.mark.parametrize("name", MODELS)
def test_every_speaker_model_keeps_weights_settings_loss_and_gradients(name):
    theirs = make(name).double()
    theirs.objective.scale, theirs.objective.margin = 20.0, 0.2
    theirs.objective.weight.requires_grad_(name != "WavLM")
    ours = copy.deepcopy(theirs)
    weight = ours.objective.weight
    assert replace_objective(ours) is ours and ours.objective.weight is weight
    assert replace_objective(ours).objective.weight is weight
    inputs, labels = speech(name)
    results = []
    for model in (theirs, ours):
        loss = model(inputs.double(), labels=labels).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert isinstance(ours.objective, AMSoftmaxLoss)
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)
    assert len(results[0]) > 20 and (ours.objective.weight.grad is None) == (name == "WavLM")


@pytest.mark.parametrize("name", MODELS)
def test_safetensors_go_to_the_plain_class_and_back(name, tmp_path, monkeypatch):
    kind = getattr(transformers, f"{name}ForXVector")
    ours = replace_objective(make(name))
    ours.save_pretrained(tmp_path / "ours")
    plain = kind.from_pretrained(tmp_path / "ours")
    assert type(plain.objective).__module__.startswith("transformers")
    plain.save_pretrained(tmp_path / "plain")
    after = replace_objective(kind.from_pretrained(tmp_path / "plain"))
    file = importlib.import_module(kind.__module__)
    monkeypatch.setattr(file, "AMSoftmaxLoss", file.AMSoftmaxLoss)  # restores it
    before = replace_objective(kind).from_pretrained(tmp_path / "plain")
    for model in (plain, after, before):
        torch.testing.assert_close(model.state_dict(), ours.state_dict(), rtol=0, atol=0)
    assert isinstance(before.objective, AMSoftmaxLoss) and before.objective.rows().is_contiguous()
    larger = kind.from_pretrained(tmp_path / "plain", num_labels=50, ignore_mismatched_sizes=True)
    assert larger.objective.weight.shape == (D, 50) and 0.8 < larger.objective.weight.std() < 1.2


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match=r"model: expected a .*ForXVector model.* Wav2Vec2Model"):
        replace_objective(transformers.Wav2Vec2Model(make().config))
    with pytest.raises(TypeError, match="or its class, got the class Linear"):
        replace_objective(torch.nn.Linear)


class Speakers(TensorDataset):
    """Gives dictionaries, as the Trainer takes them."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {"input_values": x, "labels": y}


def train(fused, folder, steps=6, resume=False, **settings):
    """Trains with the Trainer and returns the losses of the steps and the model."""
    model = make(gradient_checkpointing=settings.pop("of_model", False))
    model = replace_objective(model) if fused else model
    torch.manual_seed(2)
    y = torch.arange(48) % C
    x = torch.randn(C, SAMPLES)[y] + 0.3 * torch.randn(len(y), SAMPLES)
    arguments = transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=3e-3, seed=3,
        lr_scheduler_type="constant", logging_steps=1, save_steps=3, report_to=[], use_cpu=True,
        disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Speakers(x, y))
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_the_trainer_logs_the_losses_of_their_objective(settings, tmp_path):
    theirs, _ = train(False, tmp_path / "theirs", **settings)
    ours, _ = train(True, tmp_path / "ours", **settings)
    assert len(ours) == 6 and ours[-1] < ours[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-4, atol=0)


def test_the_trainer_in_bf16_stays_near_their_objective(tmp_path):
    theirs, _ = train(False, tmp_path / "theirs", bf16=True)
    ours, _ = train(True, tmp_path / "ours", bf16=True)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0.05, atol=0)


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_the_trainer_resumes_from_a_checkpoint_of_either_objective(first, tmp_path):
    whole, trained = train(True, tmp_path / "whole")
    train(first == "ours", tmp_path / "part", steps=3)
    resumed, again = train(True, tmp_path / "part", resume=True)
    torch.testing.assert_close(torch.tensor(resumed), torch.tensor(whole), rtol=2e-4, atol=0)
    torch.testing.assert_close(again.objective.weight, trained.objective.weight, rtol=0, atol=2e-4)


def test_accelerate_saves_model_and_state_by_safetensors_and_loads_them(tmp_path):
    accelerate = pytest.importorskip("accelerate", exc_type=ImportError)
    accelerator = accelerate.Accelerator(cpu=True)

    def prepared(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        return accelerator.prepare(model, optimizer)

    def step(model, optimizer):
        inputs, labels = speech()
        accelerator.backward(model(inputs, labels=labels).loss)
        optimizer.step()
        optimizer.zero_grad()
        return model.objective.weight

    ours, optimizer = prepared(replace_objective(make()))
    step(ours, optimizer)
    accelerator.save_state(tmp_path / "state")
    accelerator.save_model(ours, tmp_path / "model")
    expected = step(ours, optimizer)
    again = make()
    accelerate.load_checkpoint_in_model(again, tmp_path / "model")
    accelerator.free_memory()
    for other in (replace_objective(make()), again):
        model, optimizer = prepared(other)
        accelerator.load_state(tmp_path / "state")
        torch.testing.assert_close(step(model, optimizer), expected, rtol=1e-4, atol=1e-5)
        accelerator.free_memory()


@pytest.mark.parametrize("label", [-100, C])
def test_a_label_that_is_no_class_is_an_error_as_in_theirs(label):
    objective, x = AMSoftmaxLoss(D, C), torch.randn(3, D)
    assert objective(x, torch.tensor([[4], [0], [2]])).isfinite()
    with pytest.raises(ValueError, match=f"y: expected labels .* got {label} in row 1"):
        objective(x, torch.tensor([[4], [label], [2]]))
