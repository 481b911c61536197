"""A WebSocket server: one client for the life of the app, and one sequence for each connection.

Start ``cidalloc serve``, and then ``uvicorn --port 8080 --app-dir examples fastapi_websocket:app``.

A client of ws://localhost:8080/sum sends numbers, and gets the sum so far for each. "end" ends its
sequence.
"""

import contextlib
import os

from fastapi import FastAPI, WebSocket

from cidalloc.client import AsyncClient, CidError, Exhausted, Unavailable

URL = os.environ.get("CIDALLOC_URL", "localhost:8001")
TRY_AGAIN_LATER, INTERNAL_ERROR = 1013, 1011  # codes of WebSocket


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI):
    async with AsyncClient(URL) as cids:
        app.state.cids = cids
        yield


app = FastAPI(lifespan=lifespan)


@app.websocket("/sum")
async def sums(socket: WebSocket):
    await socket.accept()
    cids = socket.app.state.cids
    try:
        # If the speaker hangs up, the block ends, and END goes with the end_inputs.
        async with cids.sequence("simple_sequence", end_inputs={"INPUT": 0}) as sequence:
            async for text in socket.iter_text():
                end = text == "end"
                result = await sequence.infer({"INPUT": 0 if end else int(text)}, end=end)
                await socket.send_text(str(result["OUTPUT"][0, 0]))
                if end:
                    break
    except (Exhausted, Unavailable) as error:
        await socket.close(TRY_AGAIN_LATER, error.code.name)
    except CidError as error:
        await socket.close(INTERNAL_ERROR, error.code.name)
