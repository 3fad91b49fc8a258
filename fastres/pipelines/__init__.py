"""predict: a network over any number of images, resumable, one row an image.

predict.py   the public function: freeze, decode in worker processes, answer
sources.py   folders, globs, lists and parquet files as one sequence of images
answers.py   a batch's rows
cluster.py   the same on a Ray cluster
images.py    decoding, and what a network is given of an image
shards.py    finished rows of a run that may be killed, and the file made of them

calibration.py has the images that freeze calibrates an int8 network on.
"""

from fastres.pipelines.predict import Predictions, predict

__all__ = ["Predictions", "predict"]
