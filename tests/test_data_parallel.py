"""The processes of a job do together what one process does. If one stops, the job ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import interrupted
import pytest
import torch
from assertions import assert_all_close, assert_close, assert_same, assert_trees_close, unmutated
from torch import Tensor, distributed
from torch.func import grad, vmap
from torch.multiprocessing.spawn import spawn

import fresnet
from fresnet import FresnetError, Params, optim, tree
from fresnet.network import across
from fresnet.network.across import share_of
from fresnet.network.moments import merge, merge_across
from fresnet.network.nodes import Bottleneck, Moments, Weights
from fresnet.pytorch.collectives import Group, all_sum, gather, neighbours
from fresnet.training import (
    Evaluation,
    check_same,
    cross_entropy,
    cutmix,
    evaluate,
    gradients,
    joined,
    make_train_step,
    mixup,
    one_of,
    share,
    start,
)
from fresnet.training.processes import ENVIRONMENT

PARAMS = fresnet.init(
    0, fresnet.Spec(Bottleneck, (1, 1), width=3), num_classes=6, dtype=torch.float64
)
OPTIMIZER = optim.sgd(0.05, momentum=0.9, weight_decay=1e-3)
STEPS = 10

several = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Case(NamedTuple):
    """Steps of processes with these shares, and the steps of one process that they should equal."""

    shares: Callable[[int], Sequence[int]]
    """From the number of processes to the number of images that each has."""

    together: Callable[[int], dict[str, Any]]
    alone: Callable[[int], dict[str, Any]] = lambda size: {}
    """From the number of processes to the options of all of them, and of one alone."""


def uneven(size: int) -> list[int]:
    return [len(part) for part in torch.arange(7).tensor_split(size)]


def even(size: int) -> list[int]:
    return [2] * size


def tied(size: int) -> dict[str, Any]:
    return {"norms_across": size}


def halves(size: int) -> dict[str, Any]:
    return {"norms_across": size // 2}


CASES = {
    "tied": Case(uneven, tied),
    "recomputed": Case(uneven, lambda size: {**tied(size), "recompute": True}),
    "clipped": Case(
        uneven, lambda size: {**tied(size), "max_norm": 0.1}, lambda size: {"max_norm": 0.1}
    ),
    "in micro-batches": Case(
        even, lambda size: {**tied(size), "micro_batches": 2}, lambda size: {"micro_batches": 2}
    ),
    "in halves": Case(uneven, halves, lambda size: {"micro_batches": 2}),
    "apart": Case(uneven, lambda size: {}, lambda size: {"micro_batches": size}),
    "apart, recomputed": Case(
        uneven, lambda size: {"recompute": True}, lambda size: {"micro_batches": size}
    ),
}
MIXED = {"mixing": one_of(mixup(0.4), cutmix(1.0)), "drop_path": 0.5, "dropout": 0.3}
MIXED |= {"average_decay": 0.9}


def batch(step: int, images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(images, 3, 33, 40, dtype=torch.float64, generator=generator)
    return x, torch.randint(6, (images,), generator=generator)


def cut(batch: tuple[Tensor, Tensor], shares: Sequence[int], rank: int) -> tuple[Tensor, Tensor]:
    x, y = batch
    return x.split(list(shares))[rank], y.split(list(shares))[rank]


def in_turns(batch: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """The batch in the order of one process's micro-batches, for shares of two images each."""
    x, y = (part.unflatten(0, (size, 2)).transpose(0, 1).flatten(0, 1) for part in batch)
    return x, y


def train(
    batches: Sequence[tuple[Tensor, Tensor]], options: dict[str, Any], group: Group | None
) -> dict[str, Any]:
    """The state after these steps, and the metrics of each step."""
    train_step = make_train_step(OPTIMIZER, group=group, **options)
    state, shown = start(PARAMS, OPTIMIZER, average="mixing" in options), []
    for each in batches:
        with unmutated(state, each):
            state, metrics = train_step(state, each)
        shown.append(metrics)
    return {"state": state, "metrics": shown}


def check_run(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Real numbers are close, and counts are the same."""
    for kind, check in ((True, partial(assert_all_close, relative=1e-10)), (False, assert_same)):
        check(*(of_kind(kind, run) for run in (actual, expected)))


def of_kind(real: bool, run: Any) -> dict[str, Tensor]:
    named = zip(map(str, tree.paths(run)), tree.leaves(run), strict=True)
    return {name: leaf for name, leaf in named if leaf.is_floating_point() is real}


def loss_of(group: Group | None, weights: Weights, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    logits, stats = fresnet.forward_train(Params(weights, PARAMS.stats), x, group=group)
    return cross_entropy(logits, y).sum(), (logits, stats)


def differentiate(part: tuple[Tensor, Tensor], group: Group | None) -> dict[str, Any]:
    """Gradients of one network, with what was seen; then of several; then a second derivative."""
    take = partial(gradients, partial(loss_of, group), parts=[part], group=group)
    grads, [(loss, (logits, stats))] = take(PARAMS.weights)
    stacked = tree.stack([PARAMS.weights, tree.map(lambda leaf: leaf * 1.1, PARAMS.weights)])

    def squared(weights: Weights) -> Tensor:
        return sum((g.square().sum() for g in tree.leaves(take(weights)[0])), torch.zeros(()))

    return {
        "grads": grads,
        "loss": loss,
        "logits": logits,
        "stats": stats,
        "ensemble": vmap(lambda weights: take(weights)[0])(stacked),
        "curvature": grad(squared)(PARAMS.weights),
    }


def scattered(weights: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, Any]:
    """A loss of weights in two dtypes. It uses one weight twice and another not at all."""
    a, b, _, c = weights
    return (a * x).sin().sum() + (b.double() * x).sum() + (a * c).square().sum(), ()


SCATTERED = (
    torch.linspace(0, 1, 5, dtype=torch.float64),
    torch.linspace(1, 2, 5),
    torch.ones(3, dtype=torch.float64),
    torch.linspace(2, 3, 5, dtype=torch.float64),
)


def scattered_parts(rank: int) -> list[tuple[Tensor]]:
    return [(torch.full((5,), 1.0 + rank + 10 * i, dtype=torch.float64),) for i in range(3)]


@contextmanager
def bucket_bytes(number: int) -> Iterator[None]:
    with mock.patch.multiple(
        import_module("fresnet.training.backward"), FIRST_BUCKET=number, BUCKET=number
    ):
        yield


def dealt(size: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Batches for each process to evaluate. The last process has none."""
    batches = [batch(100 + i, 3 + i) for i in range(5)]
    return [*(batches[rank :: size - 1] for rank in range(size - 1)), []]


def refusal(state: Any, group: Group | None) -> str:
    with pytest.raises(FresnetError) as refused:
        check_same(state, group)
    return str(refused.value)


def work(rank: int, size: int, port: int, folder: Path) -> None:
    """All that one process does, for the tests below to look at."""
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    with joined(backend="gloo") as processes:
        group = processes.group
        found: dict[str, Any] = {}
        for name, case in CASES.items():
            shares = case.shares(size)
            batches = [cut(batch(i, sum(shares)), shares, rank) for i in range(STEPS)]
            found[name] = train(batches, case.together(size), group)
        found["mixed"] = train([batch(10 * i + rank, 3) for i in range(STEPS)], MIXED, group)
        found["derivatives"] = differentiate(cut(batch(0, 7), uneven(size), rank), group)
        for number in (1, 100, 10**6):
            with bucket_bytes(number):
                sums = gradients(scattered, SCATTERED, scattered_parts(rank), group=group)[0]
            found[f"buckets of {number}"] = sums
        found["evaluation"] = evaluate(PARAMS, dealt(size)[rank], group=group)._asdict()
        same = start(PARAMS, OPTIMIZER)
        check_same(same, group)
        other = same._replace(step=same.step + (rank == size - 1))
        averaged = start(PARAMS, OPTIMIZER, average=rank == 1)
        frozen = start(fresnet.freeze(PARAMS) if rank == 1 else PARAMS, OPTIMIZER)
        found["refusals"] = [refusal(state, group) for state in (other, averaged, frozen)]
    torch.save([dict(found), tuple(processes[1:])], folder / f"{rank}.pt")


class Job(NamedTuple):
    size: int
    ranks: list[dict[str, Any]]
    """What each process found."""


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(4, marks=pytest.mark.long)],
    ids=lambda size: f"{size} processes",
)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    size, folder = request.param, tmp_path_factory.mktemp("job")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(work, (size, port, folder), nprocs=size)
    ranks = []
    for rank in range(size):
        found, told = torch.load(folder / f"{rank}.pt", weights_only=False)
        assert told == (rank, size, torch.device("cpu"))
        ranks.append(found)
    return Job(size, ranks)


@several
@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_one_process(job: Job, name: str) -> None:
    case = CASES[name]
    batches = [batch(i, sum(case.shares(job.size))) for i in range(STEPS)]
    if case.shares is even:
        batches = [in_turns(each, job.size) for each in batches]
    expected = train(batches, case.alone(job.size), None)
    for found in job.ranks:
        check_run(found[name], expected)


@several
@pytest.mark.parametrize("name", [*CASES, "mixed"])
def test_states_and_metrics_are_the_same_to_the_bit_on_every_process(job: Job, name: str) -> None:
    for found in job.ranks[1:]:
        assert_same(found[name], job.ranks[0][name])


@several
def test_gradients_are_those_of_one_process(job: Job) -> None:
    expected = differentiate(batch(0, 7), None)
    each = [found["derivatives"] for found in job.ranks]
    for found in each:
        for name in ("grads", "stats", "ensemble"):
            assert_trees_close(found[name], expected[name], 1e-10)
    assert_close(sum(found["loss"] for found in each), expected["loss"], 1e-12)
    assert_close(torch.cat([found["logits"] for found in each]), expected["logits"], 1e-12)
    # Every process has the whole function as its loss, and a derivative is that of their sum.
    total = tree.map(lambda *parts: sum(parts) / job.size, *(found["curvature"] for found in each))
    assert_trees_close(total, expected["curvature"], 1e-9)


@several
@pytest.mark.parametrize("number", [1, 100, 10**6])
def test_sums_do_not_depend_on_the_buckets(job: Job, number: int) -> None:
    parts = [part for rank in range(job.size) for part in scattered_parts(rank)]
    expected, _ = gradients(scattered, SCATTERED, parts)
    assert not expected[2].any()
    for found in job.ranks:
        assert_same(found[f"buckets of {number}"], job.ranks[0][f"buckets of {number}"])
        for actual, right in zip(found[f"buckets of {number}"], expected, strict=True):
            assert_close(actual, right, 1e-6 if right.dtype == torch.float32 else 1e-12)


@several
def test_an_evaluation_is_that_of_one_process(job: Job) -> None:
    every = [each for batches in dealt(job.size) for each in batches]
    expected = evaluate(PARAMS, every)
    for found in job.ranks:
        actual = Evaluation(**found["evaluation"])
        assert_same(actual.confusion, expected.confusion)
        assert (actual.images, actual.top1, actual.top5) == (
            expected.images,
            expected.top1,
            expected.top5,
        )
        assert abs(actual.loss - expected.loss) <= 1e-12 * expected.loss


@several
def test_different_states_are_refused_by_every_process(job: Job) -> None:
    for found in job.ranks:
        step, *structures = found["refusals"]
        assert f"process {job.size - 1} differs from process 0's at ('step',): from" in step
        for structure in structures:
            assert "process 1 differs from process 0's in structure: from another" in structure


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Group]:
    """A group that holds only this process."""
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    group = distributed.group.WORLD
    assert group is not None
    yield group
    distributed.destroy_process_group()


def test_sums_start_while_the_gradient_is_being_taken(
    alone: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums of the last layers start first, and only when the last part's gradient comes."""
    events = []
    all_reduce = distributed.all_reduce

    def logged(buffer: Tensor, **options: Any) -> Any:
        events.append(f"sum of {len(buffer)}")
        return all_reduce(buffer, **options)

    def layers(weights: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Any]:
        for i, w in enumerate(weights):
            x = (w.sum() * x).sin()
            x.register_hook(lambda _, i=i: events.append(f"back at {i}"))
        return x.sum(), ()

    monkeypatch.setattr(distributed, "all_reduce", logged)
    weights = [torch.ones(length) for length in (1, 2, 3)]
    with bucket_bytes(1):
        gradients(layers, weights, [(torch.ones(2),)] * 2, group=alone)
    one = ["back at 2", "back at 1", "back at 0"]
    last = ["back at 2", "sum of 3", "back at 1", "sum of 2", "back at 0", "sum of 1"]
    assert events == one + last


def test_a_sum_starts_only_after_those_before_it(
    alone: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds whichever gradient comes first, because processes must add in one order."""
    sent = []
    all_reduce = distributed.all_reduce

    def logged(buffer: Tensor, **options: Any) -> Any:
        sent.append(len(buffer))
        return all_reduce(buffer, **options)

    def backwards(weights: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Any]:
        for w in reversed(weights):
            x = (w.sum() * x).sin()
        return x.sum(), ()

    monkeypatch.setattr(distributed, "all_reduce", logged)
    weights = [torch.ones(length) for length in (1, 2, 3)]
    with bucket_bytes(1):
        gradients(backwards, weights, [(torch.ones(2),)], group=alone)
    assert sent == [3, 2, 1]


def test_norms_across_processes_take_one_message_each_and_one_back(
    alone: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for all processes, so their number is the price."""
    sent: list[str] = []

    def counted(name: str) -> Any:
        function = getattr(distributed, name)

        def call(*args: Any, **options: Any) -> Any:
            sent.append(name)
            return function(*args, **options)

        return call

    for name in ("all_gather", "all_reduce"):
        monkeypatch.setattr(distributed, name, counted(name))
    norms = sum(path[-1] == "mean" for path in tree.paths(PARAMS.stats))
    forward = partial(loss_of, alone, x=batch(0, 3)[0], y=batch(0, 3)[1])
    grad(forward, has_aux=True)(PARAMS.weights)
    assert sent == ["all_gather"] * norms + ["all_reduce"] * norms
    sent.clear()
    monkeypatch.setattr(across, "GATHERED", 0)  # as if there were many processes
    grad(forward, has_aux=True)(PARAMS.weights)
    assert sent == ["all_reduce"] * 4 * norms


@pytest.mark.parametrize("known", [True, False])
def test_processes_share_norms_with_those_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Of 12 processes, those of the group's ranks 8 to 11 are together if 4 are.

    They wait for each other as long as all do, where PyTorch tells how long that is.
    """
    group: Any = mock.Mock(**{"size.return_value": 12, "rank.return_value": 10})
    store, waits = f"file://{tmp_path}/store", timedelta(seconds=7)
    distributed.init_process_group("gloo", store, timeout=waits, rank=0, world_size=1)
    if not known:
        monkeypatch.delattr(distributed.distributed_c10d, "_get_default_store")
    monkeypatch.setattr(distributed, "get_process_group_ranks", lambda _: [*range(100, 112)])
    monkeypatch.setattr(distributed, "new_group", lambda ranks, **options: (ranks, options))
    found: list[Any] = [neighbours(group, count) for count in (1, 4, 12)]
    monkeypatch.undo()
    distributed.destroy_process_group()
    options = {"timeout": waits if known else None, "use_local_synchronization": True}
    assert found == [None, ([108, 109, 110, 111], options), group]


def test_whoever_waits_for_some_is_named_as_one_of_all(
    alone: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*_: Any, **__: Any) -> None:
        raise RuntimeError("timed out")

    for name, value in {"get_rank": lambda: 10, "get_world_size": lambda: 12}.items():
        monkeypatch.setattr(distributed, name, value)
    for name, tell in {"all_reduce": all_sum, "all_gather": gather}.items():
        monkeypatch.setattr(distributed, name, silent)
        with pytest.raises(FresnetError, match=r"^process 10 of 12 waited 0 s for another"):
            tell(torch.ones(2), alone)


def test_the_same_moments_of_several_processes_count_once() -> None:
    parts = [fresnet.forward_moments(PARAMS, batch(i, 2 + i)[0])[1] for i in range(2)]
    copies = [share_of(part, 3) for part in parts for _ in range(3)]
    assert_trees_close(merge(*copies), merge(*parts), 1e-12)


def test_a_number_of_processes_that_does_not_divide_them_is_refused(alone: Group) -> None:
    for wrong in (0, 2, 1.0, True, None):
        with pytest.raises(FresnetError, match="norms_across to divide the number of processes, 1"):
            make_train_step(OPTIMIZER, group=alone, norms_across=wrong)  # type: ignore[arg-type]


def test_one_process_is_a_group_too(alone: Group) -> None:
    batches = [batch(i, 3) for i in range(2)]
    expected = train(batches, {}, None)
    check_run(train(batches, {"norms_across": 1}, alone), expected)
    check_same(expected, alone)


def test_one_value_per_channel_is_too_few_for_a_group_of_one_process(alone: Group) -> None:
    with pytest.raises(FresnetError, match="more than one value per channel at every norm"):
        fresnet.forward_train(PARAMS, torch.ones(1, 3, 1, 1, dtype=torch.float64), group=alone)


@pytest.mark.parametrize("n", [0.0, 1.0])
def test_moments_of_no_value_or_of_one_merge_across_processes(alone: Group, n: float) -> None:
    """A frozen norm has those of none."""
    seen = Moments(torch.tensor(n), torch.full((3,), 5 * n), torch.zeros(3))
    assert_same(merge_across(seen, alone), seen)


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(backend="gloo") as processes:
        check_same(PARAMS, processes.group)
    assert processes == (None, 0, 1, torch.device("cpu"))
    assert not distributed.is_initialized()


def test_half_of_torchruns_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(FresnetError, match=r"LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        joined(backend="gloo"),
    ):
        pass


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ({}, ""),
        ({"WORLD_SIZE": "", "RANK": "", "MASTER_PORT": ""}, ""),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "29500"}, ""),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2.0", "RANK": "0"}, "RANK=0, WORLD_SIZE=2.0"),
        ({"RANK": "3"}, "RANK=3"),  # of which nobody would write anything
        ({"RANK": "-1"}, "RANK=-1"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2, WORLD_SIZE=2"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "port"}, "MASTER_PORT=port"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
    ],
)
def test_variables_that_are_not_torchruns(
    values: dict[str, str], got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one is not set, and what torchrun never sets is refused."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    if not got:
        with joined(backend="gloo") as processes:
            assert processes == (None, 0, 1, torch.device("cpu"))
        return
    with (
        pytest.raises(FresnetError, match=f"joined expects what torchrun sets: .*; got .*{got}"),
        joined(backend="gloo"),
    ):
        pass


@pytest.mark.slow
def test_a_process_that_finds_no_other_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unanswered:
        unanswered.bind(("127.0.0.1", 0))
        values = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**values, "MASTER_PORT": unanswered.getsockname()[1]}.items():
            monkeypatch.setenv(name, str(value))
        with (
            pytest.raises(FresnetError, match=r"^process 1 of 2 waited \d s for another, which"),
            joined(timeout_s=1, backend="gloo"),
        ):
            pass


@pytest.mark.parametrize(
    ("images", "processes", "would"),
    [(64, 3, "63 or 66 would"), (2, 3, "; 3 would"), (0, 2, "; 2 would"), (65, 64, "64 or 128")],
)
def test_a_batch_that_does_not_divide_is_refused(images: int, processes: int, would: str) -> None:
    with pytest.raises(FresnetError, match=f"a batch of {images} images does not .*{would}"):
        share(images, processes)


START = "start the same command again to go on from the last checkpoint"


def run_job(how: str) -> tuple[subprocess.Popen[str], str, float]:
    """A job, its stdout and stderr until its first process ended, and the seconds until then."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", interrupted.__file__]
    torchrun = subprocess.Popen(
        [*command, how], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert torchrun.stdout is not None
    stopped, lines = 0.0, []
    for line in torchrun.stdout:
        lines.append(line)
        if line.startswith("stopping"):
            stopped = time.monotonic()
        if line.startswith("error: process 0"):
            break
    return torchrun, "".join(lines), time.monotonic() - stopped


@several
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP", "SIGTERM", "FresnetError"])
def test_a_process_that_stops_ends_the_job_with_one_message(how: str) -> None:
    torchrun, said, seconds = run_job(how)
    if how == "SIGSTOP":  # torchrun waits another 30 s for it
        stopped = next(line for line in said.splitlines() if line.startswith("stopping"))
        os.kill(int(stopped.split()[1]), signal.SIGKILL)
    rest, _ = torchrun.communicate(timeout=60)
    said += rest
    assert torchrun.returncode != 0
    [message] = [line for line in said.splitlines() if line.startswith("error: process")]
    waited = "[5-9] s" if how == "SIGSTOP" else "[0-4] s"
    assert re.match(f"error: process 0 of 2 waited {waited} for another, which has ended", message)
    assert START in message
    assert "gloo" not in said
    assert "is done" not in said
    if how == "FresnetError":
        assert "error: an image is damaged" in said
    else:
        assert seconds < 2 * interrupted.TIMEOUT_S
    if how == "SIGTERM":
        assert f"process 1 of 2 was told to end, as when another has ended; {START}" in said


@several
def test_a_process_that_torchrun_ends_while_it_computes_says_so(tmp_path: Path) -> None:
    """Another process has ended, and this one has not noticed yet."""
    script = tmp_path / "busy.py"
    script.write_text(
        "import os, signal, time\n"
        "from fresnet.training import joined\n"
        "with joined(backend='gloo') as processes:\n"
        "    if processes.rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ran = subprocess.run([*command, script], capture_output=True, text=True, timeout=60)
    assert ran.returncode != 0
    assert f"process 0 of 2 was told to end, as when another has ended; {START}\n" in ran.stderr
