r"""A service that runs one network and swaps domain packs while it serves.

    BASE=net.folded.onnx PACKS=packs/ PUBLIC_KEY=release.pub.pem \
        uvicorn --factory service:from_environment

POST /predict {"inputs": {"x": [[...]]}}  the outputs by name, and the domain that made them
GET  /domains                             the packs that there are, and the one in use
POST /swap {"domain": "night"}            another pack; {"domain": null}: the base's own statistics

A request is answered by one domain from beginning to end. A pack that is not signed by the key, is
damaged, or is for another base is refused, and what was served goes on. Who may reach /swap decides
what is predicted: keep it on an inner address, or behind your own authentication. How large a
request may be, the server in front says.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

import bnfold

STATUS = {2: 422, 3: 422}  # exit code -> HTTP status: what the caller sent; else it is ours, 503
MOST_ROWS = 64


class Asked(BaseModel):
    """Inputs by name, each nested lists of numbers with the batch as first axis."""

    model_config = ConfigDict(extra="forbid")
    inputs: dict[str, list[Any]] = Field(min_length=1)


class Wanted(BaseModel):
    """A domain's name, or null."""

    model_config = ConfigDict(extra="forbid")
    domain: str | None


def create(base: Path, packs: Path, public_key: Path) -> FastAPI:
    """The application; the folder of packs is looked at whenever it is asked about."""
    deployment = bnfold.load(base, public_key=public_key)
    app = FastAPI(title="bnfold service")
    # a name and what serves under it: replaced together, in one assignment
    app.state.current = (None, deployment.serving)

    @app.exception_handler(bnfold.BnfoldError)
    def refused(_: Request, error: bnfold.BnfoldError) -> JSONResponse:
        return JSONResponse({"error": error.to_dict()}, STATUS.get(error.exit_code, 503))

    def there() -> dict[str, Path]:
        return {path.stem: path for path in sorted(packs.glob("*.pack"))}

    @app.get("/domains")
    def domains() -> dict[str, Any]:
        return {"domains": list(there()), "serving": app.state.current[0]}

    # no `async`: FastAPI then runs each request in a thread, and one does not wait for another
    @app.post("/swap")
    def swap(wanted: Wanted) -> dict[str, Any]:
        found = there()
        if wanted.domain is not None and wanted.domain not in found:
            raise bnfold.UsageError(f"There is no domain '{wanted.domain}'; see /domains.")
        pack = None if wanted.domain is None else found[wanted.domain]
        app.state.current = (wanted.domain, deployment.swap(pack))
        return {"serving": wanted.domain}

    @app.post("/predict")
    def predict(asked: Asked) -> dict[str, Any]:
        domain, serving = app.state.current  # these, whatever is swapped in from here on
        outputs = serving.run({name: array_of(name, rows) for name, rows in asked.inputs.items()})
        for name, value in outputs.items():
            if not np.isfinite(value).all():  # which JSON cannot say
                raise bnfold.InputError(f"'{name}' would come out as NaN or infinity.")
        return {
            "domain": domain,
            "outputs": {name: value.tolist() for name, value in outputs.items()},
        }

    return app


def array_of(name: str, rows: list[Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The rows as float32; a sentence for what is ragged, not finite, or too much."""
    if len(rows) > MOST_ROWS:
        raise bnfold.UsageError(f"'{name}' has {len(rows)} rows; at most {MOST_ROWS} at a time.")
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(rows, np.float32)
    except (OverflowError, TypeError, ValueError):
        raise bnfold.UsageError(f"'{name}' is not an array of numbers.") from None
    if not np.isfinite(array).all():
        raise bnfold.UsageError(f"'{name}' holds numbers that are not finite in float32.")
    return array


def from_environment() -> FastAPI:
    """The application as BASE, PACKS and PUBLIC_KEY say."""
    return create(*(Path(os.environ[name]) for name in ("BASE", "PACKS", "PUBLIC_KEY")))
