"""A whole run on folders of images: recipe, data, steps, evaluations, checkpoints and record.

A run may be stopped at any moment. Started again, it goes on from its last checkpoint and ends with
the same bits as a run that was never stopped. Another number of processes can go on with it too.
The numbers are then the same to rounding if norms go across all of them and nothing is mixed;
otherwise each norm sees a share of another size.
"""

from contextlib import closing
from pathlib import Path

from fresnet.data.loading import OnBroken
from fresnet.data.shards import Scanned
from fresnet.errors import FresnetError, shown
from fresnet.network.nodes import Params
from fresnet.training.course import Course, Options, Outcome
from fresnet.training.plan import Run
from fresnet.training.processes import Processes, check_same


def train(
    run: Run,
    params: Params,
    folders: tuple[Scanned, Scanned],
    out: Path,
    processes: Processes,
    *,
    recompute: bool = False,
    workers: int = 0,
    broken: OnBroken = "raise",
    keep: int = 3,
    save_every: int | None = None,
) -> Outcome:
    """Train to the end, from the last checkpoint in `out` if there is one.

    Args:
      params: the network to begin with.
      folders: the images to train on, and those to validate on.
      out: the folder for checkpoints, log, pictures and the trained network.
      processes: this process among those that train together.
      recompute: as in `make_train_step`.
      workers: how many processes read images for each process that trains.
      broken: whether an image that cannot be read ends the run, "raise", or is left out, "skip".
      keep: how many checkpoints remain.
      save_every: steps between checkpoints, besides those at the end of each epoch.
    Raises:
      FresnetError: if the checkpoint is of another run, if a loss or a weight is not finite, if an
        image cannot be read, if a file cannot be written, or if another process does not answer.
      KeyboardInterrupt: at SIGINT or SIGTERM, once the state is saved; at a second one at once.
    """
    if save_every is not None and save_every < 1:
        raise FresnetError(f"train expects save_every to be at least 1; got {shown(save_every)}")
    options = Options(recompute, workers, broken, keep, save_every)
    course = Course(run, params, folders, out, processes, options)
    # The log is read before any process has passed `check_same`, so before the first one writes it.
    missed = course.missed_evaluation()
    check_same(course.state, processes.group)
    places = course.places()
    with course.opened(), closing(course.batches(places)) as batches:
        try:
            found = course.end_epoch() if missed else None
            for batch in batches:
                course.take(batch)
                stop = course.stopped()
                if stop or course.checkpoint_due():
                    course.checkpoint(together=not stop)
                if stop:
                    raise KeyboardInterrupt
                if course.epoch_ends():
                    found = course.end_epoch()
            found = found or course.validate()  # a run that had ended before says its result again
        except Exception as error:
            if not course.stopped():
                raise
            # The other processes may have stopped already, and the error may come from that.
            course.checkpoint(together=False)
            raise KeyboardInterrupt from error
        return course.finish(found)
