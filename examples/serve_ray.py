"""serve_ray.py: images over HTTP by Ray Serve; each replica gathers requests to batches on a frozen model of its own.

pip install "fastres[cli,ray]" "ray[serve]"
fastres freeze torchvision:resnet18 --weights resnet18.pth --save net.fastres
python examples/serve_ray.py net.fastres
curl --data-binary @photo.jpg http://127.0.0.1:8000/
"""

import os
import sys

import numpy
from ray import serve

import fastres.ray

BATCH = 8


@serve.deployment(ray_actor_options={"num_cpus": 1}, max_ongoing_requests=4 * BATCH)
class Classifier:
    def __init__(self, model, image_size=224):
        self.predict = fastres.ray.Predictor(model, batch=BATCH, image_size=image_size)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.005)
    async def classify(self, files: list[bytes]) -> list[dict]:
        rows = self.predict({"bytes": numpy.array(files, object)})
        names = ("classes", "scores", "error")
        # JSON has no NaN: where there is an error there are neither classes nor scores.
        kept = [names if not error else ("error",) for error in rows["error"]]
        return [{name: numpy.asarray(rows[name][i]).tolist() for name in kept[i]} for i in range(len(files))]

    async def __call__(self, request):
        return await self.classify(await request.body())


def main(model, replicas=1, image_size=224, port=8000):
    """Start the service, on the cluster that this process is connected to or on a new one; returns at once."""
    serve.start(http_options={"port": port})
    service = Classifier.options(num_replicas=replicas).bind(os.path.abspath(model), image_size)
    return serve.run(service, name="fastres")


if __name__ == "__main__":
    main(sys.argv[1])
    input("Enter ends it. ")
