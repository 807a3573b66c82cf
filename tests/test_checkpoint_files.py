# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests checkpoint files: interrupted and simultaneous saves, changed and forged bytes, paths."""

import contextlib
import errno
import io
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_checkpoint import make, state, step
from torch.distributed.checkpoint import metadata

from marginkernels.distributed.checkpoint import files, index, load_checkpoint, save_checkpoint
from tests.support import workers


def saved(path, **settings):
    """Saves, and returns, a model and an optimizer after a step."""
    model, optimizer = make("adamw", 0, **settings)
    step(model, optimizer, 0)
    save_checkpoint(path, model, optimizer)
    return model, optimizer


def same(one, other):
    one, other = state(*one), state(*other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0)


def save_and_die(folder, victims):
    """Kills ranks when they have written their part of the second checkpoint."""
    model, optimizer = saved(f"{folder}/first")
    found = state(model, optimizer)
    if dist.get_rank() == 0:
        torch.save(found, f"{folder}/expected.pt")
    if dist.get_rank() in victims:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    step(model, optimizer, 1)
    save_checkpoint(f"{folder}/second", model, optimizer)


@pytest.mark.parametrize("victims", [(1,), (0, 1)])
def test_an_interrupted_save_leaves_the_one_before(victims, tmp_path):
    pool = workers.Pool(2, timeout=20)
    pool.start(save_and_die, str(tmp_path), victims)
    first, second = pool.outcomes()
    pool.kill()
    assert second == (False, None) and not first[0]
    assert not (tmp_path / "second").exists()
    leftovers = list(tmp_path.glob("second.*.partial"))
    assert len(leftovers) == (0 in victims)  # a rank that lives on removes the directory
    model, optimizer = make("adamw", 99)
    for path in [tmp_path / "second", *leftovers]:
        with pytest.raises((FileNotFoundError, ValueError), match="path: expected a checkpoint"):
            load_checkpoint(path, model, optimizer)
    load_checkpoint(tmp_path / "first", model, optimizer)
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    for name, value in state(model, optimizer).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    save_checkpoint(tmp_path / "second", model, optimizer)
    load_checkpoint(tmp_path / "second", model, optimizer)


def save_slowly(path, seed, go):
    """Saves when ``go`` saves are about to write."""
    model, optimizer = make("adamw", seed)
    step(model, optimizer, seed)
    make_folder = files.new_folder

    def both_at_once(path):
        name = make_folder(path)
        deadline = time.monotonic() + 30
        while len(list(path.parent.glob("*.partial"))) < go and time.monotonic() < deadline:
            time.sleep(0.01)
        return name

    files.new_folder = both_at_once
    try:
        save_checkpoint(path, model, optimizer)
    except FileExistsError as error:
        return str(error)
    finally:
        files.new_folder = make_folder
    return state(model, optimizer)


def test_of_two_saves_to_one_path_one_is_published_whole(tmp_path):
    pools, results = [workers.Pool(2), workers.Pool(2)], {}
    try:
        threads = [
            threading.Thread(
                target=lambda seed=seed, pool=pool: results.update(
                    {seed: pool.run(save_slowly, str(tmp_path / "step"), seed, 2)}
                )
            )
            for seed, pool in enumerate(pools)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for pool in pools:
            pool.kill()
    [lost] = [r for r in results.values() if isinstance(r[0], str)]
    [won] = [r[0] for r in results.values() if isinstance(r[0], dict)]
    assert all("path: expected a new directory" in error for error in lost)
    assert os.listdir(tmp_path) == ["step"]
    model, optimizer = make("adamw", 99)
    load_checkpoint(tmp_path / "step", model, optimizer)
    for name, value in state(model, optimizer).items():
        torch.testing.assert_close(value, won[name], rtol=0, atol=0)


def test_a_directory_made_during_the_save_stays(tmp_path, monkeypatch):
    publish, path = files.publish, tmp_path / "saved"

    def publish_late(*arguments):
        path.mkdir()
        publish(*arguments)

    monkeypatch.setattr(files, "publish", publish_late)
    with pytest.raises(FileExistsError, match="path: expected a new directory"):
        save_checkpoint(path, *make("adamw", 0))
    assert [*tmp_path.iterdir()] == [path] and not [*path.iterdir()]


def test_odd_paths_fail_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, optimizer = make("adamw", 0)
    Path("dangling").symlink_to("nowhere")
    Path("file").touch()
    before = sorted(os.listdir())
    odd = [".", "/", "..", "", "new/..", "dangling", "file", "file/new", "n" * 256, "n\0"]
    for path in odd:
        with pytest.raises((FileExistsError, ValueError)):
            save_checkpoint(path, model, optimizer)
        assert sorted(os.listdir()) == before, path
    for path in ("n" * 250, "ü" * 120, Path("new/deep/one"), "with a trailing slash/"):
        save_checkpoint(path, model, optimizer)
        load_checkpoint(path, model, optimizer)


def paths_that_differ(folder):
    rank = dist.get_rank()
    model, optimizer = make("adamw", 0)
    errors = []
    for name in (f"step_{rank}", rank):
        with pytest.raises((ValueError, TypeError), match="path: expected") as error:
            save_checkpoint(folder / name if isinstance(name, str) else name, model, optimizer)
        errors.append(str(error.value))
    os.makedirs(folder / str(rank), exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / str(rank))  # one name, two places
        with pytest.raises(ValueError, match="path: expected storage that all ranks share"):
            save_checkpoint("step", model, optimizer)
        with pytest.raises(FileNotFoundError, match="path: expected a checkpoint"):
            load_checkpoint("step", model, optimizer)
    return errors


def test_paths_that_differ_by_rank_are_refused_on_all(tmp_path):
    first, second = workers.run(2, paths_that_differ, tmp_path)
    assert first[0] == second[0]
    assert not list(tmp_path.glob("step*")) and not list(tmp_path.glob("*/*"))


def flip(path, position):
    with open(path, "r+b") as file:
        file.seek(position)
        [byte] = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def positions(path, number=12):
    """Returns places in a file, in no pattern that its contents have."""
    size = os.path.getsize(path)
    return [size * i // number for i in range(number)]


def refuses_flipped(path):
    model = make("adamw", 99)
    step(*model, 5)
    before = state(*model)
    with pytest.raises(ValueError, match=r"not as saved|\.metadata: "):
        load_checkpoint(path, *model)
    for name, value in state(*model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_flipped_byte_in_any_file_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 1000)
    path = tmp_path / "saved"
    model = saved(path)
    names = sorted(os.listdir(path))
    assert len(names) == 3
    for name in names:
        for position in positions(path / name):
            flip(path / name, position)
            refuses_flipped(path)
            flip(path / name, position)
    [data] = path.glob("*.distcp")
    content = data.read_bytes()
    for broken in (content[:-1000], b""):
        data.write_bytes(broken)
        refuses_flipped(path)
    data.unlink()
    with pytest.raises(ValueError, match="is missing"):
        load_checkpoint(path, *make("adamw", 1))
    data.write_bytes(content)
    (path / files.SUMS).unlink()
    loaded = make("adamw", 1)
    with pytest.warns(UserWarning, match="has no checksums"):
        load_checkpoint(path, *loaded)
    same(loaded, model)


@contextlib.contextmanager
def blocks_of(size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", size)
        yield


def save_in_blocks(path):
    with blocks_of(500):
        saved(path)


def load_flipped(path, expected):
    model = make("adamw", 99)
    before = state(*model)
    with blocks_of(500), pytest.raises(ValueError) as error:
        load_checkpoint(path, *model)
    for name, value in state(*model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert expected in str(error.value)


def test_ranks_share_the_checking_and_fail_together(tmp_path):
    path = tmp_path / "saved"
    workers.run(3, save_in_blocks, str(path))
    for data in path.glob("*.distcp"):
        for position in positions(data, 3):
            flip(data, position)
            workers.run(2, load_flipped, str(path), f"{data.name}: not as saved")
            flip(data, position)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("part", ["index", "index and checksums", "settings"])
def test_loading_runs_no_code(part, tmp_path):
    model, optimizer = make("sgd", 0)
    step(model, optimizer, 0)
    path, trace = tmp_path / "forged", Payload(tmp_path / "trace")
    if part == "settings":
        optimizer.param_groups[0]["dampening"] = trace
    save_checkpoint(path, model, optimizer)
    if part != "settings":
        (path / ".metadata").write_bytes(pickle.dumps(trace))
    if part == "index and checksums":
        (path / files.SUMS).unlink()
    reason = "Weights only load failed" if part == "settings" else "unexpected pathlib.*in the ind"
    model, optimizer = make("sgd", 1)
    before = state(model, optimizer)
    with pytest.raises(ValueError, match=reason):
        load_checkpoint(path, model, optimizer)
    assert not trace.path.exists()
    for name, value in state(model, optimizer).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


class Attribute:
    """Is pickled by ``getattr``, as Python 3.11.0 to 3.11.3 pickles the members of enumerations."""

    def __init__(self, *owner_and_name):
        self.owner_and_name = owner_and_name

    def __reduce__(self):
        return getattr, self.owner_and_name


@pytest.mark.parametrize("unpickler", [index._Unpickler, index._CarefulUnpickler])
def test_an_index_has_members_of_enumerations_by_name_and_no_other_attribute(unpickler):
    def read(*owner_and_name):
        return unpickler(io.BytesIO(pickle.dumps(Attribute(*owner_and_name)))).load()

    kind = metadata._MEM_FORMAT_ENCODING
    assert read(kind, "TORCH_CONTIGUOUS_FORMAT") is kind.TORCH_CONTIGUOUS_FORMAT
    for owner, name in ((kind, "mro"), (metadata.Metadata, "__init__")):
        with pytest.raises(pickle.UnpicklingError, match="unexpected getattr"):
            read(owner, name)


def with_storage_that_fails(path):
    """Lets one rank's storage fail at writing and at checking, and then work again."""
    model, optimizer = make("adamw", 0)
    step(model, optimizer, 0)
    before = state(model, optimizer)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    for module, name, act in (
        (os, "fsync", save_checkpoint),
        (files, "publish", save_checkpoint),
        (files, "check_blocks", load_checkpoint),
    ):
        if act is load_checkpoint:
            save_checkpoint(path, model, optimizer)
            step(model, optimizer, 1)
            before = state(model, optimizer)
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == (name != "publish"):
                patch.setattr(module, name, fail)
            with pytest.raises((RuntimeError, OSError), match="Input/output error") as error:
                act(path, model, optimizer)
        assert act is save_checkpoint or isinstance(error.value, RuntimeError)
        dist.barrier()
        assert os.listdir(Path(path).parent) == ["saved"] * (act is load_checkpoint)
        for key, value in state(model, optimizer).items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_storage_that_fails_on_one_rank(tmp_path):
    workers.run(2, with_storage_that_fails, str(tmp_path / "saved"))


def with_one_rank_that_differs(path):
    saved(path)
    rank = dist.get_rank()
    model, optimizer = make("adamw", 1)
    before = state(model, optimizer)
    if rank == 1:
        model["more"] = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"model: expected that of .* has no \['more\.bias'"):
        load_checkpoint(path, model, optimizer)
    with pytest.raises(ValueError, match="optimizer: expected the same on all ranks"):
        save_checkpoint(f"{path}_2", model, optimizer if rank else None)
    for name, value in state(model, optimizer).items():
        torch.testing.assert_close(value, before.get(name, value), rtol=0, atol=0)


def test_what_one_rank_finds_wrong_changes_nothing_on_any(tmp_path):
    workers.run(2, with_one_rank_that_differs, str(tmp_path / "saved"))
    assert os.listdir(tmp_path) == ["saved"]
