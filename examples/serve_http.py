"""serve_http.py: images over HTTP (FastAPI); requests gathered to batches, several threads on one frozen model.

pip install "fastres[cli,predict]" fastapi uvicorn
fastres freeze torchvision:resnet18 --weights resnet18.pth --save net.fastres
python examples/serve_http.py net.fastres --port 8000
curl --data-binary @photo.jpg http://127.0.0.1:8000/classify
"""

import argparse
import asyncio
import queue
import threading
import time
from concurrent.futures import Future

import numpy
import torch

import fastres.ray  # its Predictor is an ordinary class; nothing here needs Ray

LARGEST = 20 << 20  # bytes of a request


class Batches:
    """Answers requests together: a thread takes the first, waits a little for more, and runs the network once."""

    def __init__(self, predict, most, threads=2, wait=0.004, waiting=128):
        self.predict, self.most, self.wait = predict, most, wait
        self.queue = queue.Queue(waiting)  # what does not fit is refused at once, so that memory stays bounded
        for _ in range(threads):
            threading.Thread(target=self._run, daemon=True).start()

    def ask(self, data):
        """A Future of the row of an image's bytes. Raises queue.Full."""
        answer = Future()
        self.queue.put_nowait((data, answer))
        return answer

    def _run(self):
        while True:
            asked, end = [self.queue.get()], time.monotonic() + self.wait
            while len(asked) < self.most:
                try:
                    asked.append(self.queue.get(timeout=max(0.0, end - time.monotonic())))
                except queue.Empty:
                    break
            try:
                rows = self.predict({"bytes": numpy.array([data for data, _ in asked], object)})
                for place, (_, answer) in enumerate(asked):
                    answer.set_result({name: values[place] for name, values in rows.items()})
            except Exception as error:  # every request of the batch hears of it
                for _, answer in asked:
                    answer.set_exception(error)


def application(batches):
    from fastapi import FastAPI, HTTPException, Request

    app = FastAPI()

    @app.post("/classify")
    async def classify(request: Request):
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > LARGEST:
                raise HTTPException(413, "too large")
        try:
            row = await asyncio.wrap_future(batches.ask(bytes(data)))
        except queue.Full:
            raise HTTPException(503, "busy", {"Retry-After": "1"}) from None
        if row["error"]:
            raise HTTPException(422, row["error"])
        return {"classes": row["classes"].tolist(), "scores": row["scores"].tolist()}

    return app


def main():
    import uvicorn

    options = argparse.ArgumentParser()
    options.add_argument("model")
    options.add_argument("--port", type=int, default=8000)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--image-size", type=int, default=224)
    given = options.parse_args()
    torch.set_num_threads(max(1, torch.get_num_threads() // given.threads))
    predict = fastres.ray.Predictor(given.model, batch=given.batch, image_size=given.image_size)
    app = application(Batches(predict, given.batch, given.threads))
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
