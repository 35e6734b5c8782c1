"""The batches of a training on several hosts, one of which may meet a record that it cannot read.

The others do not know of it and have sent steps to their devices that wait for it. So it goes on with its last batch,
marked as not whole, and a step on such a batch changes nothing (`state.make_step`), nor does any after it: the state
stays that of the last step for which every host had its own. Where all hosts look at their metrics, they find the same
step, save that state, and end. One host alone raises at once what was met.
"""

from typing import Any

import jax
import numpy as np

from ard_jax.errors import UserError
from ard_jax.hosts import gather_json
from ard_jax.types import Batch, Batches, PyTree

WHOLE = "whole"  # a batch's entry, (batch,) bool: are the records those of the step; a metric: did it change the state


class Reading:
    """Batches, each with `WHOLE` where several hosts read, and where in the data the last good one ends.

    Attributes:
        position: of the data after the last batch that every host is known to have had, or that one host alone had.
    """

    def __init__(self, batches: Batches):
        self.batches, self.alone = batches, jax.process_count() == 1
        self.error: UserError | None = None
        self.last: Batch | None = None
        self.pending: list[tuple[PyTree, jax.Array]] = []  # the position after a step, and whether it was whole
        self._position = None if self.alone else batches.get_state()

    @property
    def position(self) -> PyTree:
        return self.batches.get_state() if self.alone else self._position

    def __next__(self) -> Batch:
        """This process's rows of the next batch.

        Raises:
            UserError: one host alone cannot read a record; or one of several cannot read its first batch, on all.
        """
        if self.alone:
            return next(self.batches)
        first = self.last is None
        if self.error is None:
            try:
                self.last = next(self.batches)
            except UserError as error:
                self.error = error
        if first and (met := self.met()):  # nothing has been sent to the devices
            raise met
        assert self.last is not None
        rows = len(jax.tree.leaves(self.last)[0])
        return {**self.last, WHOLE: np.full(rows, self.error is None)}

    def note(self, metrics: dict[str, Any]) -> None:
        """Takes what a step says of its batch out of its metrics."""
        if not self.alone:
            self.pending.append((self.batches.get_state(), metrics.pop(WHOLE)))

    def is_whole(self) -> bool:
        """Whether all steps so far changed the state; all hosts ask after the same step."""
        pending, self.pending = self.pending, []
        for position, whole in pending:
            if not jax.device_get(whole):
                return False
            self._position = position
        return True

    def met(self) -> UserError | None:
        """What one of the hosts could not read, for all of them to raise; all of them ask."""
        for host, sentence in enumerate(gather_json(self.error and str(self.error))):
            if sentence:
                return self.error or UserError(f"host {host} stopped: {sentence}")
        return None
