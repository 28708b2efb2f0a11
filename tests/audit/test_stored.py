"""Certificates on disk while they are obtained: killed, resumed, shared among processes, always those of one run."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import trivet
from trivet import api
from trivet.audit import stored as stored_module
from trivet.audit.stored import Stored, in_processes, overridden
from trivet.certify import adaptive_smoothing
from trivet.certify.adaptive_smoothing import AdaptiveSmoothing
from trivet.certify.certificate_file import CertificateFile
from trivet.certify.certifier import Certificates, Certifier
from trivet.certify.smoothing import Smoothing
from trivet.data.dataset import Dataset
from trivet.errors import BadValue, TrivetError
from trivet.randomness import generator
from trivet.runs import Run

FIXED = Smoothing(0.3, n0=20, n=300)
ADAPTIVE = AdaptiveSmoothing(0.3, n0=20, n=2_000, radii=(0.0, 0.3, 0.6), batch_size=100)
RECIPE = """\
name: tiny
about: A recipe for tests.
data: {name: digits, train_limit: 100, test_limit: 20}
model: {name: mlp}
threat: {name: l2, eps: 0.5}
stages:
  - fit: {objective: {name: gaussian, sigma: 0.25}, epochs: 2, optimizer: {name: adam, lr: 5e-3}}
audit:
  certificate: {name: adaptive_smoothing, sigma: 0.25, n: 1000, radii: [0, 0.25]}
"""


@pytest.fixture
def data() -> Dataset:
    images = torch.rand(9, 1, 6, 6, generator=generator(0, "test images"))
    return Dataset(images, torch.arange(9) % 3, ("a", "b", "c"), "test", scale=1.0)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))


def quiet(amount: float = 1, /, note: str = "") -> None:
    pass


def store(folder: Path, certifier: Certifier, data: Dataset, seed: int = 3) -> Stored:
    return Stored(folder / "certificates.json", certifier, seed, "weights", data)


def certified(stored: Stored, model: nn.Module, wanted: int) -> Certificates:
    """What `certify_model` does, in one process."""
    known = stored.gather()
    found = stored.extend(model, stored.missing(known, wanted), known, quiet)
    assert found is not None
    return found


def equal(one: Certificates, other: Certificates) -> bool:
    columns = [(getattr(one, name), getattr(other, name)) for name in ("index", "labels", "radii")]
    return all(torch.equal(a, b) for a, b in [*columns, *((one.evidence[k], other.evidence[k]) for k in one.evidence)])


BOTH = pytest.mark.parametrize("certifier", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])


@BOTH
def test_what_is_there_is_not_done_again_and_more_is_added(
    certifier: Certifier, data: Dataset, model: nn.Module, tmp_path: Path
) -> None:
    stored = store(tmp_path, certifier, data)
    few = certified(stored, model, 4)
    assert few.index.tolist() == [0, 1, 2, 3]
    assert stored.missing(few, 4).tolist() == []
    assert stored.missing(few, 6).tolist() == [4, 5]
    more = certified(stored, model, 9)
    assert equal(more.first(4), few)
    written = stored.read()
    assert written is not None
    assert equal(written, more)
    whole = certifier.certify(model, data.batch(torch.arange(9)).inputs, seed=3)
    assert equal(whole, more)


@BOTH
def test_portions_give_the_certificates_of_one_piece(
    certifier: Certifier, data: Dataset, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = certifier.certify(model, data.batch(torch.arange(9)).inputs, seed=3)
    monkeypatch.setattr(stored_module, "_PORTION", 2)
    assert equal(certified(store(tmp_path, certifier, data), model, 9), whole)


def test_a_kill_inside_an_input_costs_what_was_counted_since_the_last_save(
    data: Dataset, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptive_smoothing, "_SAVE_EVERY", 0.0)
    save, left = CertificateFile.save, [4]

    def save_then_die(self: CertificateFile, path: Path) -> None:
        save(self, path)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    stored = store(tmp_path, ADAPTIVE, data)
    monkeypatch.setattr(CertificateFile, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        certified(stored, model, 9)
    part = stored.read()
    assert part is not None
    assert 0 < len(stored.missing(part, 9)) < 9  # some inputs are done, others begun
    begun = part.evidence["n"][stored.missing(part, 9)]
    assert bool((begun > 0).all())
    monkeypatch.setattr(CertificateFile, "save", save)
    counted: list[int] = []
    count = adaptive_smoothing.NoisyVotes.count
    monkeypatch.setattr(
        adaptive_smoothing.NoisyVotes,
        "count",
        lambda self, blocks: counted.extend(b.rows for b in blocks) or count(self, blocks),
    )
    found = certified(stored, model, 9)
    assert equal(found, ADAPTIVE.certify(model, data.batch(torch.arange(9)).inputs, seed=3))
    rest = int((found.evidence["n"] - part.evidence["n"]).sum())
    first = int(sum(counted)) - int(found.evidence["n"].sum()) - 9 * 20  # what the comparison run counted
    assert first == rest


@pytest.mark.parametrize("change", [{"seed": 4}, {"certifier": Smoothing(0.3, n0=20, n=301)}, {"artefact": "others"}])
def test_certificates_obtained_otherwise_are_not_taken(
    change: dict[str, object], data: Dataset, model: nn.Module, tmp_path: Path
) -> None:
    stored = store(tmp_path, FIXED, data)
    certified(stored, model, 2)
    other = Stored(**({**vars(stored)} | change))  # type: ignore[arg-type]
    assert other.read() is None
    assert other.missing(other.read(), 2).tolist() == [0, 1]


@BOTH
def test_shards_are_moved_into_the_one_file(
    certifier: Certifier, data: Dataset, model: nn.Module, tmp_path: Path
) -> None:
    stored = store(tmp_path, certifier, data)
    known = certified(stored, model, 2)
    missing = stored.missing(known, 9)
    for number in range(2):
        stored.extend(model, missing[number::2], known, quiet, stored.shard(number))
    store(tmp_path, certifier, data, seed=99).file_of(known).save(stored.shard(7))  # of another run
    assert len(stored.shards()) == 3
    found = stored.gather()
    assert found is not None
    assert stored.shards() == []
    assert equal(found, certifier.certify(model, data.batch(torch.arange(9)).inputs, seed=3))
    again = stored.read()
    assert again is not None
    assert equal(again, found)


def test_what_went_on_overrides_what_was_there(data: Dataset, model: nn.Module, tmp_path: Path) -> None:
    x = data.batch(torch.arange(9)).inputs
    done = ADAPTIVE.certify(model, x, seed=3)
    stages: list[Certificates] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive_smoothing, "_SAVE_EVERY", 0.0)
        ADAPTIVE.go_on(model, x, seed=3, save=stages.append)
    merged = overridden(stages[0], done.select(slice(2, 5)))
    assert merged.index.tolist() == list(range(9))
    assert equal(merged.select(slice(2, 5)), done.select(slice(2, 5)))
    assert equal(merged.first(2), stages[0].first(2))
    assert equal(overridden(None, done), done)


# Processes


def fail(number: int, advance: Callable[..., None]) -> None:
    advance(0.5)
    raise TrivetError(f"number {number} has had enough.")


def vanish(number: int, advance: Callable[..., None]) -> None:
    os._exit(9)


def test_a_worker_that_dies_stops_the_run() -> None:
    with pytest.raises(TrivetError, match=r"a worker stopped: it was killed\. .* the same command goes on"):
        in_processes(vanish, 1, quiet)


def test_a_worker_that_fails_says_why_and_one_whose_parent_is_gone_stops() -> None:
    context = multiprocessing.get_context("spawn")
    progress, errors = context.Value("d", 0.0), context.SimpleQueue()
    with pytest.raises(SystemExit):
        stored_module._work(fail, 3, torch.get_num_threads(), os.getppid(), progress, errors)
    assert errors.get() == "number 3 has had enough."
    assert progress.value == 0.5
    with pytest.raises(SystemExit):
        stored_module._work(fail, 3, torch.get_num_threads(), -1, progress, errors)
    assert errors.empty()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(RECIPE)
    return trivet.train_model(folder / "tiny.yaml", out=folder / "tiny").folder.path


def test_two_processes_write_the_file_that_one_writes(run: Path) -> None:
    one = trivet.certify_model(run, points=7)
    file = run / "certificates.json"
    written = file.read_text()
    file.unlink()
    told: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "in_processes", lambda task, workers, _: in_processes(task, workers, told.append))
        two = trivet.certify_model(run, points=7, processes=2)
    assert file.read_text() == written
    assert equal(one.certificates, two.certificates)
    assert sum(told) == pytest.approx(7)
    assert not list(run.glob("certificates.shard-*"))


def test_a_run_of_two_processes_goes_on_as_one_with_what_was_left_behind(run: Path) -> None:
    whole = trivet.certify_model(run, points=12).certificates
    (run / "certificates.json").unlink()
    certifier = Run.open(run).plan.audit.certificate
    assert certifier is not None
    partial(api._certify_shard, run, WHERE, certifier, 12, 2)(1, quiet)  # the other worker never came to anything
    assert (run / "certificates.shard-1.json").exists()
    assert equal(trivet.certify_model(run, points=12).certificates, whole)


WHERE = {"recipe": None, "data": None, "overrides": (), "out": None, "trust_code": False, "device": "cpu"}


def test_a_module_in_memory_cannot_be_opened_twice_and_no_processes_are_too_few(run: Path, tmp_path: Path) -> None:
    opened = Run.open(run)
    net = opened.model(opened.plan.splits().test)
    with pytest.raises(BadValue, match="processes=2 open the model from a file each"):
        trivet.certify_model(net, recipe=run.parent / "tiny.yaml", out=tmp_path / "out", processes=2)
    with pytest.raises(BadValue, match="processes=0 must be at least 1"):
        trivet.certify_model(run, processes=0)
