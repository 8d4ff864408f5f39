"""Training as pure functions: a state, a step, and what is around them.

optimizer = fresnet.optim.sgd(0.1, momentum=0.9)
state = fresnet.training.start(fresnet.init(0), optimizer)
train_step = fresnet.training.make_train_step(optimizer)
state, metrics = train_step(state, (x, y))
"""

from fresnet.training.backward import gradients
from fresnet.training.checkpoint import Restored, restore_state, save_state
from fresnet.training.evaluation import Evaluation, evaluate
from fresnet.training.masks import Masks, draw_masks, masked
from fresnet.training.mixing import cutmix, mixup, one_of
from fresnet.training.processes import Processes, check_same, joined, share
from fresnet.training.state import TrainState, start
from fresnet.training.step import Metrics, make_train_step
from fresnet.training.targets import cross_entropy

__all__ = [
    "Evaluation",
    "Masks",
    "Metrics",
    "Processes",
    "Restored",
    "TrainState",
    "check_same",
    "cross_entropy",
    "cutmix",
    "draw_masks",
    "evaluate",
    "gradients",
    "joined",
    "make_train_step",
    "masked",
    "mixup",
    "one_of",
    "restore_state",
    "save_state",
    "share",
    "start",
]
