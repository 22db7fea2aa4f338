"""The log line of Tecorigin's ModelZoo, as its TCAP_DLLogger writes it and its loss.py reads it."""

import datetime


def line(iteration: int, epoch: int, loss: float, images_per_second: float, rank: int = 0) -> str:
    """One training step: `iteration` and `epoch` count from 0; units that are empty leave a second blank."""
    return (
        f"TCAPPDLL {datetime.datetime.now()} - Epoch: {epoch} Iteration: {iteration}  rank : {rank}  "
        f"train.loss : {loss}  train.ips : {images_per_second} imgs/s"
    )
