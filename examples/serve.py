"""Serves a classifier over HTTP.

pip install 'convit-jax[predict]' starlette uvicorn
python examples/serve.py convit_tiny.safetensors 8000
curl --data-binary @photo.jpg localhost:8000
"""

import dataclasses
import sys

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
import uvicorn

from convit_jax.predict import Predictor
from convit_jax.weights.load import read_weights

predictor = Predictor(read_weights(sys.argv[1]), batch_size=1)


def classify(picture: bytes) -> list[dict]:
    (found,) = predictor.top([predictor.pixels(picture)], 5)
    return [dataclasses.asdict(prediction) for prediction in found]


async def answer(request: Request) -> JSONResponse:
    try:
        return JSONResponse(await run_in_threadpool(classify, await request.body()))
    except ValueError as error:  # not a readable image
        return JSONResponse({"error": str(error)}, status_code=400)


app = Starlette(routes=[Route("/", answer, methods=["POST"])])
uvicorn.run(app, port=int(sys.argv[2]))
