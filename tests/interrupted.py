"""A training job, started by torchrun, in which the last process stops on the way:

torchrun --nproc-per-node 2 interrupted.py SIGKILL   # or SIGSTOP, SIGTERM; FresnetError; never
"""

import os
import signal
import sys

import torch
from torch import Tensor

import fresnet
from fresnet import FresnetError
from fresnet.network.nodes import Bottleneck
from fresnet.training import cross_entropy, joined, make_train_step, start

TIMEOUT_S = 5.0
STEPS, LAST = 6, 3


def main(how: str) -> None:
    optimizer = fresnet.optim.sgd(0.1)
    state = start(fresnet.init(0, fresnet.Spec(Bottleneck, (1,), 4), num_classes=4), optimizer)
    batch = torch.ones(2, 3, 32, 32), torch.tensor([0, 1])

    with joined(timeout_s=TIMEOUT_S, backend="gloo") as processes:

        def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
            """The loss. In it the last process stops, and the others then wait in the pass back."""
            if processes.rank == processes.size - 1 and state.step == LAST:
                if how == "FresnetError":
                    raise FresnetError("an image is damaged")
                if how != "never":
                    print(f"stopping {os.getpid()}", flush=True)
                    os.kill(os.getpid(), signal.Signals[how])
            return cross_entropy(logits, targets)

        tied = how in ("SIGKILL", "FresnetError")
        train_step = make_train_step(
            optimizer, loss_fn=loss_fn, group=processes.group, norms_across=2 if tied else 1
        )
        for _ in range(STEPS):
            state, _ = train_step(state, batch)
    print(f"process {processes.rank} is done", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except FresnetError as error:
        sys.exit(f"error: {error}")
